"""What DeepSpeed needs to build its operators at first use: a C++ compiler, ninja, libaio, a matching CUDA toolkit."""

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from taso_ds.distributed.accelerator import Accelerator, can_build_async_io, cuda_toolkit
from taso_ds.doctor.finding import Finding, fail, ok, warn
from taso_ds.doctor.folders import check_writing

_LONGEST_BUILD = 600.0  # seconds
_PROGRAM = "#include <vector>\nint main() { return static_cast<int>(std::vector<int>{}.size()); }\n"


def check_compiler(accelerator: Accelerator | None, *, offload: bool) -> list[Finding]:
    """Compile a program as DeepSpeed would, and look for ninja.

    Args:
        accelerator: None where DeepSpeed cannot say.
        offload: whether the run offloads to NVMe.
    """
    needed = offload or accelerator is None or accelerator.is_host
    missing = fail if needed else warn  # on GPUs a run without NVMe builds nothing
    compiler = os.environ.get("CXX", "c++")
    problem = _compile(compiler)
    remedy = "install g++ (build-essential, gcc-c++), or name a C++ compiler in CXX"
    found = [missing("C++ compiler", problem, remedy) if problem else ok("C++ compiler", f"{compiler} compiles")]
    ninja = shutil.which("ninja")
    if ninja is None:
        remedy = "pip install ninja, and activate the environment so that its bin folder is in PATH"
        return [*found, missing("ninja", "not in PATH", remedy)]
    return [*found, ok("ninja", ninja)]


def _compile(compiler: str) -> str | None:
    """Return what went wrong when a small program was compiled and linked; None when nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "program.cpp"
        source.write_text(_PROGRAM)
        command = [*shlex.split(compiler), "-std=c++17", str(source), "-o", str(source.with_suffix(""))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{compiler}: {error}"
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    return f"{compiler} fails: {(errors or ['no message'])[0][:160]}" if done.returncode else None


def check_cuda_toolkit(accelerator: Accelerator, *, offload: bool) -> list[Finding]:
    """Compare the CUDA toolkit with the CUDA torch was built for; nothing to find on other accelerators."""
    if accelerator.is_host or accelerator.cuda is None:
        return []
    severe = fail if offload else warn  # only building an operator needs the toolkit
    toolkit = cuda_toolkit()
    remedy = f"load the CUDA {accelerator.cuda} toolkit and set CUDA_HOME to it"
    if toolkit.version is None:
        return [severe("CUDA toolkit", f"{toolkit.problem}; torch is built for {accelerator.cuda}", remedy)]
    if toolkit.problem:
        return [severe("CUDA toolkit", f"{toolkit.version}, but torch is built for {accelerator.cuda}", remedy)]
    return [ok("CUDA toolkit", f"{toolkit.version}, torch is built for {accelerator.cuda}")]


def check_build_folder(folder: Path) -> list[Finding]:
    """Look at the folder operators are built in, for one that cannot be written and for locks of builds that died.

    torch waits for such a lock for ever, on every rank, and says nothing.
    """
    remedy = "set TORCH_EXTENSIONS_DIR to a folder that can be written"
    found = [check_writing("build folder", folder, remedy=remedy)]
    old = [path for path in sorted(folder.glob("**/lock")) if time.time() - path.stat().st_mtime > _LONGEST_BUILD]
    if old:
        found.append(warn("build lock", f"{old[0]} is left from a build that did not end", f"rm {old[0]}"))
    return found


def check_libaio(*, offload: bool) -> Finding:
    """Ask DeepSpeed whether it could build asynchronous disk access, which offload to NVMe needs."""
    if can_build_async_io():
        return ok("libaio", "found")
    if offload:
        return fail("libaio", "not found, and the run offloads to NVMe", "install libaio-dev (libaio-devel on Red Hat)")
    return ok("libaio", "not found; only offload to NVMe needs it")
