"""Start kernels by forking a process that has the imports: they take most of a short run.

With this folder on PYTHONPATH it stands for ipykernel's own launcher. A kernel still is a process
of its own, with the arguments, the environment and the folder that it is started with.
"""

import gc
import json
import os
import signal
import socket
import sys
import threading

SOCKET = "FORKED_KERNELS"  # the variable that names the socket of `serve`


def serve() -> None:
    """Import what notebooks import, then fork a kernel for every client until killed."""
    import peft  # noqa: F401
    import sentence_transformers  # noqa: F401
    import transformers.modeling_utils  # noqa: F401
    import uke.report.figures
    import uke.study  # noqa: F401
    from ipykernel.kernelapp import IPKernelApp

    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended kernels are nobody's to wait for
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.environ[SOCKET])
        server.listen()
        print("ready", flush=True)
        client, _ = server.accept()
        while os.fork():
            client.close()
            client, _ = server.accept()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    arguments, environment, folder = json.loads(client.makefile().readline())
    os.environ.clear()
    os.environ.update(environment)
    os.environ.pop("JPY_PARENT_PID", None)  # the parent to outlive is the client
    os.chdir(folder)
    threading.Thread(target=lambda: client.recv(1) or os._exit(1), daemon=True).start()
    IPKernelApp.launch_instance(argv=arguments)
    os._exit(0)


def attend() -> None:
    """Ask for a kernel, and end when it ends."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[SOCKET])
        request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()])
        server.sendall(request.encode() + b"\n")
        server.recv(1)


if __name__ == "__main__":
    attend() if sys.argv[1:] else serve()
