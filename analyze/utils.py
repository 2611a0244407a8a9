"""The names that upstream's scripts import; each is defined in the module that it comes from."""

from analyze.attention import attnmap_mamba, get_attnmap_mamba
from analyze.receptive_field import EffectiveReceiptiveField, EffectiveReceptiveField

__all__ = ["AttnMamba", "EffectiveReceiptiveField", "EffectiveReceptiveField", "attnmap_mamba", "get_attnmap_mamba"]


class AttnMamba:
    """The functions of attention maps, under the name of upstream's class."""

    attnmap_mamba = staticmethod(attnmap_mamba)
    get_attnmap_mamba = staticmethod(get_attnmap_mamba)
