"""Look into the networks of this repository: attention maps, effective receptive fields, throughput, FLOPs.

`attnmap.py`, `erf.py`, `tp.py` and `flops.py` are commands; `utils.py` has the names that upstream's scripts import.
"""
