"use strict";
// Three small things: the theme button, the layer selector, and tooltips. The page is complete without any of them.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement, tip = document.getElementById("tip");
  const SVG = (document.querySelector("svg") || root).namespaceURI;
  const ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_.";
  const DEAD = 65, GAP = 66, HALF = 32;

  // --- theme: auto, light, dark -------------------------------------------------------------------------------
  const button = document.getElementById("theme"), themes = ["auto", "light", "dark"];
  const setTheme = name => {
    if (name === "auto") delete root.dataset.theme; else root.dataset.theme = name;
    button.textContent = "Theme: " + name;
    button.setAttribute("aria-label", "Colour theme: " + name);
  };
  let theme = Math.max(0, themes.indexOf(new URLSearchParams(location.search).get("theme")));
  setTheme(themes[theme]);
  button.addEventListener("click", () => setTheme(themes[theme = (theme + 1) % 3]));

  // --- numbers ------------------------------------------------------------------------------------------------
  const big = v => {
    for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(v) >= size * 0.9995) return +(v / size).toPrecision(3) + unit;
    return String(+v.toPrecision(3));
  };
  const duration = s => s < 60 ? s.toFixed(1) + " s" : s < 3600 ? (s / 60).toFixed(1) + " min" : (s / 3600).toFixed(2) + " h";
  const ratio = code => code === GAP ? "not logged" : code === DEAD ? "no token" :
    Math.pow(2, (code - HALF) / 8).toFixed(2) + "× fair share" + (code === 0 ? " or less" : code === 64 ? " or more" : "");

  // --- drawing cells, the same way charts.py does ---------------------------------------------------------------
  const make = (name, attributes) => {
    const node = document.createElementNS(SVG, name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    return node;
  };
  const cellClass = char => {
    const code = ALPHABET.indexOf(char);
    if (code === GAP) return null;
    return code === DEAD ? "dead" : "h" + Math.max(0, Math.min(12, Math.floor((code - HALF) * 3 / 8 + 0.5) + 6));
  };
  const drawCells = (rows, svg) => {
    const paths = {};
    rows.forEach((row, y) => {
      for (let start = 0, stop; start < row.length; start = stop) {
        const css = cellClass(row[start]);
        for (stop = start + 1; stop < row.length && cellClass(row[stop]) === css;) stop++;
        if (css) paths[css] = (paths[css] || "") + `M${start} ${y}h${stop - start}v1H${start}z`;
      }
    });
    const columns = rows[0].length;
    let mesh = "";
    if (columns <= 40) for (let x = 1; x < columns; x++) mesh += `M${x} 0v${rows.length}`;
    if (rows.length <= 40) for (let y = 1; y < rows.length; y++) mesh += `M0 ${y}h${columns}`;
    const nodes = Object.entries(paths).map(([css, d]) => make("path", { class: css, d }));
    svg.replaceChildren(...nodes, make("path", { class: "mesh", d: mesh }));
    svg.setAttribute("viewBox", `0 0 ${columns} ${rows.length}`);
  };
  const cut = (string, width) => string.match(new RegExp(`.{${width}}`, "g")) || [];
  const expertTicks = (chart, group, count, room, vertical) => {
    const [left, top, width, height] = chart.dataset.box.split(" ").map(Number);
    let step = 1;
    while (count / step > room) step *= 2;
    const nodes = [];
    for (let e = 0; e < count; e += step) {
      const place = (e + 0.5) / count;
      const node = make("text", vertical ? { class: "tick", x: left - 8, y: top + place * height + 4, "text-anchor": "end" }
        : { class: "tick", x: left + place * width, y: top + height + 16, "text-anchor": "middle" });
      node.textContent = e;
      nodes.push(node);
    }
    group.replaceChildren(...nodes);
  };

  // --- the layer selector ---------------------------------------------------------------------------------------
  let layer = 0;
  const show = index => {
    layer = index;
    document.querySelectorAll(".layername").forEach(node => { node.textContent = data.load.layers[index].n; });
    document.querySelectorAll("[data-l]").forEach(node => node.classList.toggle("on", node.dataset.l === String(index)));
    document.querySelectorAll("svg[data-kind]").forEach(chart => {
      const cells = chart.querySelector("svg.cells"), wide = chart.classList.contains("wide");
      const kind = chart.dataset.kind, experts = data.load.layers[index].e;
      if (kind === "load") {
        drawCells(cut(data.load.layers[index].s, data.load.x.length), cells);
        expertTicks(chart, chart.querySelector(".yt"), experts, 16, true);
      } else if (kind === "domain") {
        drawCells(cut(data.domain.layers[index].h, experts), cells);
        expertTicks(chart, chart.querySelector(".xt"), experts, wide ? 32 : 8, false);
      } else if (kind === "stack") {
        const base = new Array(experts).fill(1000);
        cells.replaceChildren(...data.domain.layers[index].p.map((row, d) => {
          let path = "";
          row.forEach((share, e) => {
            if (share > 0) { path += `M${e + 0.08} ${base[e]}h.84v${-share}h-.84z`; base[e] -= share; }
          });
          return make("path", { class: "fill d" + d, d: path });
        }));
        cells.setAttribute("viewBox", `0 0 ${experts} 1000`);
        expertTicks(chart, chart.querySelector(".xt"), experts, wide ? 32 : 10, false);
      }
    });
  };
  const picker = document.getElementById("layer");
  if (picker && data.load) {
    picker.addEventListener("change", () => { document.body.classList.add("picked"); show(+picker.value); });
    if (+picker.value) picker.dispatchEvent(new Event("change"));  // a browser may restore the choice on reload
  }

  // --- tooltips -------------------------------------------------------------------------------------------------
  const say = (event, title, rows) => {
    const head = document.createElement("b");
    head.textContent = title;
    tip.replaceChildren(head, ...rows.map(text => {
      const row = document.createElement("div");
      row.textContent = text;
      return row;
    }));
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(6, Math.min(innerWidth - box.width - 6, event.clientX + 14)) + "px";
    tip.style.top = (event.clientY + box.height + 24 > innerHeight ? event.clientY - box.height - 12 : event.clientY + 16) + "px";
  };
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const mid = (low + high) >> 1; if (xs[mid] < x) low = mid; else high = mid; }
    return xs.length && Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
  };
  const lineTip = (chart, info, event, x) => {
    let rows = info.lines.map(line => {
      const i = nearest(line.x, x);
      return { line, value: line.y[i], at: line.x[i] };
    }).filter(row => row.value !== null && row.value !== undefined);
    if (!rows.length) return false;
    const at = rows.reduce((best, row) => Math.abs(row.at - x) < Math.abs(best - x) ? row.at : best, rows[0].at);
    if (rows.length > 9) {
      rows.sort((a, b) => b.value - a.value);
      const chosen = rows.filter(row => row.line.l === layer);
      rows = [...rows.slice(0, 3), ...chosen, ...rows.slice(-3)].filter((row, i, all) => all.indexOf(row) === i);
    }
    const title = info.xf === "time" ? duration(at) : big(at) + " tokens";
    say(event, title, rows.map(row => `${row.line.n}: ${row.value.toFixed(info.digits)}${info.unit}`));
    return true;
  };
  const heatTip = (kind, event, column, row) => {
    if (kind === "overview") {
      const code = ALPHABET.indexOf(data.overview[row][column]);
      if (column < data.load.layers[row].e) say(event, `Layer ${data.load.layers[row].n}, expert ${column}`, [ratio(code)]);
    } else if (kind === "load") {
      const code = ALPHABET.indexOf(data.load.layers[layer].s[row * data.load.x.length + column]);
      say(event, `Expert ${row}, up to ${big(data.load.x[column])} tokens`, [ratio(code)]);
    } else if (kind === "domain") {
      const code = ALPHABET.indexOf(data.domain.layers[layer].h[row * data.load.layers[layer].e + column]);
      say(event, `${data.domain.names[row]} → expert ${column}`, [ratio(code)]);
    } else if (kind === "ranks") {
      const { layers, rows, mean } = data.ranks, value = rows[row][column];
      say(event, `Rank ${column}, layer ${layers[row]}`, value === null ? ["has not this layer"] :
        [`${big(value)} rows per step`, `${(value / mean[row]).toFixed(2)}× the mean`]);
    } else {
      say(event, `Expert ${column}`, data.domain.names.map((name, d) =>
        `${name}: ${(data.domain.layers[layer].p[d][column] / 10).toFixed(1)}%`));
    }
  };
  document.querySelectorAll("svg[data-chart]").forEach(chart => {
    const kind = chart.dataset.kind, info = data.charts[chart.dataset.chart];
    const [left, top, width, height, x0, x1] = chart.dataset.box.split(" ").map(Number);
    const cursor = make("path", { class: "cursor" });
    const hide = () => { tip.hidden = true; cursor.remove(); };
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("pointermove", event => {
      const box = chart.getBoundingClientRect(), scale = chart.viewBox.baseVal.width / box.width;
      const across = ((event.clientX - box.left) * scale - left) / width, down = ((event.clientY - box.top) * scale - top) / height;
      if (across < 0 || across >= 1 || down < 0 || down >= 1) return hide();
      if (kind) {
        const view = chart.querySelector("svg.cells").viewBox.baseVal;
        heatTip(kind, event, Math.floor(across * view.width), Math.floor(down * view.height));
      } else if (info && lineTip(chart, info, event, x0 + across * (x1 - x0))) {
        cursor.setAttribute("d", `M${left + across * width} ${top}v${height}`);
        chart.append(cursor);
      } else hide();
    });
  });
})();
