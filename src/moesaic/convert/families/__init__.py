"""Every family that is read and written, by its ``model_type``. A new one is a file here and a line below."""

from moesaic.convert.families.llama import LLAMA, MISTRAL
from moesaic.convert.families.mixtral import MIXTRAL
from moesaic.convert.family import Family

FAMILIES: dict[str, Family] = {family.model_type: family for family in (MIXTRAL, LLAMA, MISTRAL)}
