#include <iostream>
#include <vector>
int main() { try { std::vector<int>().at(3); } catch (const std::exception &e) { std::cerr << e.what() << '\n'; return 2; } }
