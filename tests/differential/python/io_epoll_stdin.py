# differential: {"stdin": "ready"}
import select
poller = select.epoll()
try:
    poller.register(0, select.EPOLLIN)
    print(poller.poll(5)[0][0])
except OSError as error:
    print(error)
