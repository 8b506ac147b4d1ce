"""Import this before MLX: its Linux wheel is linked to Netlib's reference BLAS, a hundredth of the speed of any other.

The loader takes a symbol from whatever global library has it first, so a real `cblas_sgemm` loaded beforehand wins:
OpenBLAS of the system, or the one inside numpy's wheel behind a few lines of C. Without a C compiler MLX stays slow,
and just as right.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

_SHIM = """
#include <stdint.h>
typedef int64_t L;
extern void scipy_cblas_sgemm64_(int, int, int, L, L, L, float, const float *, L, const float *, L, float, float *, L);
void cblas_sgemm(int o, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc) {
  scipy_cblas_sgemm64_(o, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
"""


def _load() -> str | None:
    """What was loaded: a library's name, or None."""
    if not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return None
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
        return "libopenblas.so.0"
    except OSError:
        pass
    libraries = sorted((Path(np.__file__).parent.parent / "numpy.libs").glob("libscipy_openblas64_*.so"))
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not libraries or compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, shim = Path(folder) / "shim.c", Path(folder) / "shim.so"
        source.write_text(_SHIM)
        command = [compiler, "-O1", "-shared", "-fPIC", source, libraries[0], f"-Wl,-rpath,{libraries[0].parent}"]
        if subprocess.run([*command, "-o", shim], capture_output=True).returncode:
            return None
        # The file may go: the loader has mapped it.
        ctypes.CDLL(str(shim), mode=ctypes.RTLD_GLOBAL)
    return libraries[0].name


LOADED = _load()
