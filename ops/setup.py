"""Builds the compiled backends of multi-scale deformable attention.

    python setup.py build_ext --inplace      next to the sources (`make op` in the repository)
    pip install .                            as the package `ms_deform_attn`
    python setup.py build install            the same, as in the released code

The libraries have a plain C interface for `ctypes`: building them takes a C++ compiler, and nvcc
for CUDA, but not torch. Its version is only read to detect an incompatible CUDA toolkit early.
MS_DEFORM_ATTN_CPU_ONLY=1 disables CUDA; TORCH_CUDA_ARCH_LIST selects the GPUs to compile for.
The root `setup.py` imports `Build` and `extensions` from here.
"""

import importlib.util
import os
import re
import runpy
import shutil
import site
import subprocess
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CXX_FLAGS = ["-std=gnu++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
CXX_FLAGS += ["-fPIC", "-fvisibility=hidden", "-shared"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler", "-fPIC", "-shared"]
# Turing to Blackwell, for builds without a GPU; those unknown to the toolkit are dropped.
USUAL_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


class Build(build_ext):
    """Compiles each library with one command; without CUDA, only the CPU library."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self) -> None:
        cpu, *cuda = self.extensions
        compiler = os.environ.get("CXX", "c++").split()
        self.compile([*compiler, *CXX_FLAGS], cpu)
        for extension in cuda:
            try:
                nvcc = find_nvcc()
                self.compile([nvcc, *NVCC_FLAGS, *architecture_flags(nvcc)], extension)
            except CompileError as reason:
                self.extensions.remove(extension)
                print(f"\nThe CUDA kernel is not built. {reason}\nThe CPU kernel is.\n", flush=True)

    def compile(self, command: list[str], extension: Extension) -> None:
        output = Path(self.get_ext_fullpath(extension.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            status = subprocess.run([*command, *extension.sources, "-o", str(output)]).returncode
        except OSError as error:
            raise CompileError(f"Cannot run {command[0]}: {error.strerror}.") from error
        if status:
            problem = f"{command[0]} failed; see its messages above."
            if extension.sources[0].endswith(".cu"):
                problem += (
                    " With nvcc the usual reason is a host compiler that is too new for the"
                    " toolkit: install an older one and select it, for example with"
                    " NVCC_PREPEND_FLAGS='-ccbin g++-12'."
                )
            raise CompileError(problem)


def find_nvcc() -> str:
    """The nvcc of a CUDA toolkit compatible with torch, or CompileError with a remedy."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [f"{home}/bin" for home in homes] + [
        os.environ.get("PATH", os.defpath),
        "/usr/local/cuda/bin",
    ]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        raise CompileError("No CUDA toolkit (nvcc) found; CUDA_HOME can point to one.")
    if (release := re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))) is None:
        raise CompileError(f"{nvcc} --version does not report a release.")
    toolkit = release[1]
    torch, cuda = torch_versions()
    if torch and not cuda:
        raise CompileError(f"torch {torch} is CPU-only; install a CUDA build to use a GPU.")
    if cuda and int(toolkit.split(".")[0]) > int(cuda.split(".")[0]):
        raise CompileError(
            f"The toolkit at {nvcc} is CUDA {toolkit}, but torch {torch} is built for CUDA {cuda},"
            " whose drivers may not run code from a newer toolkit. Either install CUDA toolkit"
            f" {cuda} (conda install -c nvidia cuda-toolkit={cuda}, or NVIDIA's installer) and set"
            f" CUDA_HOME to it, or install torch for CUDA {toolkit} (pip install torch"
            f" --index-url https://download.pytorch.org/whl/cu{toolkit.replace('.', '')});"
            " then build again."
        )
    return nvcc


def torch_versions() -> tuple[str | None, str | None]:
    """The versions of torch and its CUDA, or None, without importing torch.

    pip's isolated build environment hides installed packages, hence the explicit paths.
    """
    paths = [*map(sysconfig.get_path, ("purelib", "platlib")), site.getusersitepackages()]
    spec = importlib.util.find_spec("torch") or PathFinder.find_spec("torch", paths)
    if spec is None or spec.origin is None:
        return None, None
    found = runpy.run_path(os.path.join(os.path.dirname(spec.origin), "version.py"))
    return found["__version__"], found.get("cuda")


def architecture_flags(nvcc: str) -> list[str]:
    """-gencode flags for TORCH_CUDA_ARCH_LIST, else the GPUs present, else the usual ones."""
    known = re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch"))
    wanted = re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if not wanted and shutil.which("nvidia-smi"):
        query = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        wanted = sorted(set(re.findall(r"^\d+\.\d+$", query, re.MULTILINE)))
    if not wanted:
        wanted = [name for name in USUAL_ARCHITECTURES if name.replace(".", "") in known]
        wanted[-1] += "+PTX"  # newer GPUs compile that when loading it
    flags = []
    for name in wanted:
        match = re.fullmatch(r"(\d+)\.(\d+)([a-z]?)(\+PTX)?", name)
        if match is None:
            raise CompileError(f"TORCH_CUDA_ARCH_LIST has {name!r}; write it like '8.0;9.0+PTX'.")
        number = match[1] + match[2]
        if number not in known:
            raise CompileError(
                f"{nvcc} does not support compute capability {name}, only {', '.join(known)}."
                " Install a toolkit that does and set CUDA_HOME to it."
            )
        number += match[3]
        for kind in ("sm", "compute") if match[4] else ("sm",):
            flags += ["-gencode", f"arch=compute_{number},code={kind}_{number}"]
    return flags


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def extensions(package: str, folder: str = "src") -> list[Extension]:
    """The CPU's library and CUDA's, as members of `package`; their sources are in `folder`."""
    sources = ["ms_deform_attn_cpu.cpp", "ms_deform_attn_cuda.cu"]
    if os.environ.get("MS_DEFORM_ATTN_CPU_ONLY"):
        sources.pop()
    return [Extension(f"{package}.lib{Path(s).stem}", [f"{folder}/{s}"]) for s in sources]


if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    setup(
        name="ms_deform_attn",
        version="1.0",
        description="Multi-scale deformable attention for PyTorch: reference, C++ and CUDA",
        packages=["ms_deform_attn"],
        package_dir={"ms_deform_attn": "."},
        ext_modules=extensions("ms_deform_attn"),
        cmdclass={"build_ext": Build},
        install_requires=["torch>=2.6"],
        python_requires=">=3.10",
    )
