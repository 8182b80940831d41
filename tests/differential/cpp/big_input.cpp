// differential: {"stdin_repeat": ["123456 ", 50000]}
#include <iostream>
int main() { long long s = 0, x; while (std::cin >> x) s += x; std::cout << s; }
