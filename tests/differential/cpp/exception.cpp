#include <stdexcept>
#include <iostream>
int main() { std::cout << "lost?\n"; throw std::runtime_error("bad"); }
