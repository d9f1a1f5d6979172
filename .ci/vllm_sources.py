"""Unpack a vLLM's Python files, and what names its version: `vllm_sources.py VERSION FOLDER [PIP ARGUMENTS]`.

The wheel, some 340 MB of binaries, is there only meanwhile, and in no cache.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def main(version: str, folder: Path, arguments: list[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder) as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
        command += ["--only-binary=:all:", "--dest", download, *arguments, f"vllm=={version}"]
        subprocess.run(command, check=True)
        (wheel,) = Path(download).glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder, [name for name in packed.namelist() if name.endswith((".py", "/METADATA"))])
    if not (folder / "vllm" / "__init__.py").is_file():
        sys.exit(f"the wheel of vllm {version} has no vllm/__init__.py")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
