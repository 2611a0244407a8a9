"""torch.hub looks here when it is given the repository; the entry points are those of vim/hubconf.py."""

import runpy
from pathlib import Path

_entries = runpy.run_path(str(Path(__file__).resolve().parent / "vim" / "hubconf.py"))
globals().update({name: entry for name, entry in _entries.items() if not name.startswith("_")})
