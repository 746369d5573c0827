"""Makes this package importable in a script that runs as a file, in an environment without this package.

A script's folder comes first on `sys.path`, so that `import hpsv3` in the script hpsv3.py would find the script again:
it is taken off. The folder that holds this package is not put on the path, as it may be a site-packages with other
versions of everything: only the package itself is made known.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_PACKAGE = _HERE.parents[1]


def make_importable() -> None:
    """Makes `import calibri_lightning` find the package that this file belongs to."""
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _HERE]
    spec = spec_from_file_location(_PACKAGE.name, _PACKAGE / "__init__.py", submodule_search_locations=[str(_PACKAGE)])
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[_PACKAGE.name] = module
    spec.loader.exec_module(module)


if not __package__:  # not where the package is imported as one already
    make_importable()
