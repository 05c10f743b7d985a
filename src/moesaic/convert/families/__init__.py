"""Every family that is read and written, by its ``model_type``. A new one is a file here and a line below."""

from moesaic.convert.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from moesaic.convert.families.gpt_oss import GPT_OSS
from moesaic.convert.families.llama import LLAMA, MISTRAL
from moesaic.convert.families.mixtral import MIXTRAL
from moesaic.convert.families.olmoe import OLMOE
from moesaic.convert.families.qwen3 import QWEN3
from moesaic.convert.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from moesaic.convert.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        MIXTRAL,
        LLAMA,
        MISTRAL,
        QWEN3,
        QWEN2_MOE,
        QWEN3_MOE,
        OLMOE,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        GPT_OSS,
    )
}
