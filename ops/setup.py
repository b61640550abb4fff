"""Builds the compiled backends of multi-scale deformable attention.

    python setup.py build_ext --inplace      beside the sources (`make op` in the project's folder)
    pip install .                            as the package `ms_deform_attn`
    python setup.py build install            the same, the way the released code did it

The libraries are plain C behind `ctypes`: they need a C++ compiler, and nvcc for CUDA, but nothing
of torch. The version of torch is only read, to say in time that a CUDA toolkit will not fit it.
MS_DEFORM_ATTN_CPU_ONLY=1 leaves CUDA out; TORCH_CUDA_ARCH_LIST names the GPUs to compile for.
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
# Turing to Blackwell, for a build on a machine without a GPU; the toolkit takes what it knows.
USUAL_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


class Build(build_ext):
    """Compiles each library with one command; without CUDA, the CPU's alone."""

    def get_ext_filename(self, name: str) -> str:
        return os.path.join(*name.split(".")) + ".so"

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
        if subprocess.run([*command, *extension.sources, "-o", str(output)]).returncode:
            raise CompileError(
                f"{command[0]} did not compile it; its message is above. With nvcc the reason is"
                " mostly a host compiler newer than the toolkit allows: install an older one and"
                " name it, as in NVCC_PREPEND_FLAGS='-ccbin g++-12'."
            )


def find_nvcc() -> str:
    """The compiler of a CUDA toolkit that fits torch; CompileError says what would help."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [f"{home}/bin" for home in homes] + [
        os.environ.get("PATH", os.defpath),
        "/usr/local/cuda/bin",
    ]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        raise CompileError("There is no CUDA toolkit here (nvcc); CUDA_HOME can name one.")
    toolkit = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))[1]
    torch, cuda = torch_versions()
    if torch and not cuda:
        raise CompileError(f"torch {torch} is for the CPU; install a build for CUDA to use a GPU.")
    if cuda and int(toolkit.split(".")[0]) > int(cuda.split(".")[0]):
        raise CompileError(
            f"The toolkit at {nvcc} is CUDA {toolkit}, but torch {torch} is built for CUDA {cuda},"
            " whose drivers need not run what a newer toolkit compiles. Either install CUDA toolkit"
            f" {cuda} (conda install -c nvidia cuda-toolkit={cuda}, or NVIDIA's installer) and set"
            f" CUDA_HOME to it, or install a torch for CUDA {toolkit} (pip install torch"
            f" --index-url https://download.pytorch.org/whl/cu{toolkit.replace('.', '')});"
            " then build again."
        )
    return nvcc


def torch_versions() -> tuple[str | None, str | None]:
    """Versions of torch and of its CUDA, each None where there is none; torch is not imported.

    pip builds in an environment of its own, which hides the installed packages: hence the paths.
    """
    paths = [*map(sysconfig.get_path, ("purelib", "platlib")), site.getusersitepackages()]
    spec = importlib.util.find_spec("torch") or PathFinder.find_spec("torch", paths)
    if spec is None:
        return None, None
    found = runpy.run_path(os.path.join(os.path.dirname(spec.origin), "version.py"))
    return found["__version__"], found.get("cuda")


def architecture_flags(nvcc: str) -> list[str]:
    """-gencode for TORCH_CUDA_ARCH_LIST, else for the GPUs present, else for the usual ones."""
    known = re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch"))
    wanted = re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if not wanted and shutil.which("nvidia-smi"):
        query = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        wanted = sorted(set(re.findall(r"^\d+\.\d+$", query, re.MULTILINE)))
    if not wanted:
        wanted = [name for name in USUAL_ARCHITECTURES if name.replace(".", "") in known]
        wanted[-1] += "+PTX"  # newer GPUs compile that when they load it
    flags = []
    for name in wanted:
        match = re.fullmatch(r"(\d+)\.(\d+)([a-z]?)(\+PTX)?", name)
        if match is None:
            raise CompileError(f"TORCH_CUDA_ARCH_LIST has {name!r}; write it as in '8.0;9.0+PTX'.")
        number = match[1] + match[2]
        if number not in known:
            raise CompileError(
                f"{nvcc} cannot compile for compute capability {name}; it knows"
                f" {', '.join(known)}. Install a toolkit that does and set CUDA_HOME to it."
            )
        number += match[3]
        for kind in ("sm", "compute") if match[4] else ("sm",):
            flags += ["-gencode", f"arch=compute_{number},code={kind}_{number}"]
    return flags


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


os.chdir(Path(__file__).parent)
sources = ["src/ms_deform_attn_cpu.cpp", "src/ms_deform_attn_cuda.cu"]
if os.environ.get("MS_DEFORM_ATTN_CPU_ONLY"):
    sources.pop()
setup(
    name="ms_deform_attn",
    version="1.0",
    description="Multi-scale deformable attention for PyTorch: reference, C++ and CUDA",
    packages=["ms_deform_attn"],
    package_dir={"ms_deform_attn": "."},
    ext_modules=[Extension(f"ms_deform_attn.lib{Path(s).stem}", [s]) for s in sources],
    cmdclass={"build_ext": Build},
    install_requires=["torch>=2.6"],
    python_requires=">=3.10",
)
