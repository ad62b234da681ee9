"""`python tests/vendor/cann_stub.py FOLDER`: libraries in the place of CANN.

With them the real torch_npu can be imported on a machine without CANN or a chip.

torch_npu's own library leaves some ninety symbols to Huawei's CANN. Each becomes a C function that
returns 0, their "success"; the few that hand something back are written out. Nothing can be
computed with them: they carry the plug-in as far as FakeTensorMode, where its schemas, shape
functions and autograd formulas run. Run it with the Python that has torch_npu; it needs a C
compiler and nm.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

NAMES = (
    "libhccl.so",
    "libascendcl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
)
LOOKED_UP = [
    "aclrtSetDeviceSatMode",
    "aclSetCompileopt",
    "aclrtSetOpExecuteTimeOut",
    "aclrtCtxSetSysParamOpt",
]  # at run time, by name
WRITTEN_OUT = """
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
int aclrtGetDeviceCount(unsigned *count) { *count = 1; return 0; }
int aclrtGetDevice(int *device) { *device = 0; return 0; }
const char *aclrtGetSocName(void) { return "Ascend910B1"; }
int aclrtGetCurrentContext(void **context) { *context = (void *)1; return 0; }
int aclrtCreateStream(void **stream) { *stream = (void *)1; return 0; }
int aclrtCreateStreamWithConfig(void **stream, unsigned priority, unsigned flag) {
    *stream = (void *)1;
    return 0;
}
int aclrtCreateEventExWithFlag(void **event, unsigned flag) { *event = (void *)1; return 0; }
int aclrtMalloc(void **memory, size_t size, int policy) { *memory = malloc(size); return 0; }
int aclrtMallocHost(void **memory, size_t size) { *memory = malloc(size); return 0; }
int aclrtGetMemInfo(int kind, size_t *free, size_t *total) {
    *free = *total = (size_t)1 << 30;
    return 0;
}
int aclrtGetSysParamOpt(int option, long *value) { *value = 0; return 0; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) {
    memcpy(to, from, size);
    return 0;
}
"""


def symbols(library: Path, which: str) -> set[str]:
    """The names that a library defines, or leaves to others."""
    listed = subprocess.run(
        ["nm", "-D", which, str(library)], capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines() if line.strip()}


def missing() -> set[str]:
    """What torch_npu's libraries need and no library of torch's or their own has.

    CANN's names, recognised by their beginnings.
    """
    torch_npu, torch = (
        Path(importlib.util.find_spec(name).origin).parent / "lib"
        for name in ("torch_npu", "torch")
    )
    needed = set().union(
        *(
            symbols(path, "--undefined-only")
            for path in (*torch_npu.glob("*.so"), *torch_npu.parent.glob("*.so"))
        )
    )
    there = set().union(
        *(
            symbols(path, "--defined-only")
            for folder in (torch_npu, torch)
            for path in folder.glob("*.so*")
        )
    )
    return {name for name in needed - there if name.startswith(("acl", "rt", "Msprof", "Hccl"))}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    written = WRITTEN_OUT.replace("*", " ")
    empty = [
        f"int {name}(void) {{ return 0; }}"
        for name in sorted(missing() | set(LOOKED_UP))
        if f" {name}(" not in written
    ]
    (folder / "stub.c").write_text(WRITTEN_OUT + "\n".join(empty) + "\n")
    for name in NAMES:
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-w", str(folder / "stub.c"), "-o", str(folder / name)],
            check=True,
        )
    print(
        f"{len(empty)} functions that do nothing, {WRITTEN_OUT.count('return')} that hand "
        "something back"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
