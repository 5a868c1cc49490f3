"""Python programs that need not import what is heavy: forks of one process that has.

    warm.py serve SOCKET [MODULES...]  waits for calls; ends, with the socket's folder, when its
                                       parent does; MODULES are imported in place of HEAVY
    warm.py MODULE WORDS...            as `python -m MODULE WORDS...`, by a fork where $WARM names
                                       the socket

Nothing of the package is loaded beforehand, so that a fork runs the code as it is on disk.
Half of a page's time in the smoke study goes into imports, the same for every page.
"""

import os
import signal
import socket
import sys

HEAVY = """
    ipykernel.kernelapp papermill.cli matplotlib.pyplot pandas seaborn scipy.ndimage scipy.optimize
    scipy.stats sklearn.metrics statsmodels.stats.multitest accelerate pycocotools.cocoeval timm
    torch.utils.flop_counter torchvision.models.detection torchvision.transforms.v2
    transformers.models.deimv2.modeling_deimv2 transformers.models.dinov3_vit.modeling_dinov3_vit
"""


def call(module, *words):
    """Run a module by a fork and end with its exit status; without a socket, as usual."""
    link = socket.socket(socket.AF_UNIX)
    try:
        link.connect(os.environ.get("WARM", ""))
    except OSError:
        os.execv(sys.executable, [sys.executable, "-m", module, *words])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the fork gets it from the terminal, too
    place = {"words": [module, *words], "folder": os.getcwd(), "environment": dict(os.environ)}
    socket.send_fds(link, [b"."], [0, 1, 2])
    link.sendall(repr(place).encode() + b"\n")
    sys.exit(status(link))


def status(link):
    """The exit status that a fork sends; the fork ends where this process's parent has gone."""
    parent = os.getppid()
    link.settimeout(1)
    while os.getppid() == parent:
        try:
            return int(link.recv(8) or 1)
        except TimeoutError:
            pass
    return 1


def answer(link):
    """In the fork: take the caller's place and run its module."""
    import ast
    import runpy
    import threading

    _, files, _, _ = socket.recv_fds(link, 1, 3)
    for number, file in enumerate(files):
        os.dup2(file, number)
    place = ast.literal_eval(link.makefile().readline())
    os.chdir(place["folder"])
    os.environ.clear()
    os.environ.update(place["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=lambda: link.recv(1) or os._exit(1), daemon=True).start()
    sys.argv = place["words"]
    sys.path[0] = place["folder"]
    code = 0
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    link.sendall(str(code).encode())
    os._exit(code)


def serve(address, *modules):
    """Import what is heavy, then make a fork for every call."""
    import importlib
    import shutil
    from socketserver import BaseRequestHandler, ForkingMixIn, UnixStreamServer

    class Handler(BaseRequestHandler):
        def handle(self):
            answer(self.request)

    class Server(ForkingMixIn, UnixStreamServer):
        max_children = 1000
        parent = os.getppid()

        def service_actions(self):
            super().service_actions()
            if os.getppid() != self.parent:
                shutil.rmtree(os.path.dirname(address), ignore_errors=True)
                os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    os.environ["JPY_PARENT_PID"] = str(os.getpid())  # kernels look for it when they are imported
    for name in modules or HEAVY.split():
        importlib.import_module(name)
    with Server(address, Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    else:
        call(*sys.argv[1:])
