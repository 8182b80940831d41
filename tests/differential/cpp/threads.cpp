#include <atomic>
#include <iostream>
#include <thread>
#include <vector>
int main() { std::atomic<int> n{0}; std::vector<std::thread> t; for (int i = 0; i < 8; i++) t.emplace_back([&] { n += i * 0 + 1; }); for (auto &x : t) x.join(); std::cout << n << "\n"; }
