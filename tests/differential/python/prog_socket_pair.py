import socket
a, b = socket.socketpair()
a.sendall(b"x" * 5); print(b.recv(9)); a.close(); print(b.recv(9))
