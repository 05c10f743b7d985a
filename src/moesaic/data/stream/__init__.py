"""Text too large to tokenise beforehand, read shard by shard while training (``data.stream=true``).

The k-th row of a run is a function of the settings, the seed and the shards' contents alone. Nothing else decides it: not the
number of processes, not where a run was stopped, not how fast anything is read.

- Shards are files: local paths, folders and patterns, ``hf://owner/name``, any fsspec URL (``shards.py``). Their list has one
  order, by source and name.
- Rows come from lanes, L of them: ``data.lanes``, or as many as a micro-batch has rows if that is less. Row b of every
  micro-batch comes from lane b * L // batch_size. A process has consecutive rows of each micro-batch, so it reads a few whole
  lanes and no others, unless there are more processes than lanes. Another number of processes is another distribution of
  lanes: nothing is read twice and nothing left out, because no lane knows who reads it (``lanes.py``).
- In each epoch the shards are put in an order drawn from (seed, epoch), and lane i takes numbers i, i + L, ... of it. Fewer
  shards than lanes are cut into stripes first: with p stripes a shard, stripe q has the documents whose number in the file is
  q modulo p. All lanes together read each document of an epoch exactly once.
- A lane reads its stripes in order; ``data.shuffle`` documents at a time are put in an order drawn from (seed, epoch, stripe,
  first document), tokenised, and packed end to end into rows as ``PackedRows`` does (``lane.py``).
- A lane that is through goes on with its part of the next epoch, without waiting for the others.
- Documents held out for validation are chosen by a hash of their text, for every seed and every run alike (``texts.py``).

A lane's position is a handful of numbers (``Cursor``): epoch, stripe, where the window of documents begins in the file, the
document of the window, tokens of it already used. Resuming opens the file there, reads the window again and drops those tokens.

What this costs, and what it was preferred to. Lanes are not equally long, so some begin an epoch while others finish theirs;
lanes are dealt anew in every epoch, so this evens out, and an epoch still holds everything once. One lane, shared by all
processes, would have a single order of text, but each process would have to read everything. Dealing single documents to
processes through a coordinator would balance perfectly, but which row comes when would depend on speed. A shuffle buffer
of the usual kind mixes further than a window, but its content would have to be saved, or be lost on resuming. A shard cut into
stripes is read whole by every lane that has one: give at least as many shards as lanes where reading is slow.
"""
