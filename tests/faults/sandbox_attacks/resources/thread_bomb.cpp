// Starts threads that start threads.
#include <system_error>
#include <thread>

void more() {
    for (;;) {
        try {
            std::thread(more).detach();
        } catch (const std::system_error &) {
        }
    }
}

int main() { more(); }
