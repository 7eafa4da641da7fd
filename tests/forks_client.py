"""The `python` that a shell script finds: hands its command to the server of tests/forks.py.

    python -I -S forks_client.py SOCKET ARGUMENTS...
"""

import array
import json
import os
import socket
import sys

_, path, *arguments = sys.argv
server = socket.socket(socket.AF_UNIX)
server.connect(path)
told = {"arguments": arguments, "env": dict(os.environ), "folder": os.getcwd()}
text = json.dumps(told).encode()
server.sendall(len(text).to_bytes(8, "big"))
handles = array.array("i", [1, 2])
server.sendmsg([b"h"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, handles)])
server.sendall(text)
sys.exit(int(server.recv(8)) & 255)
