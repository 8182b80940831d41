// Largest difference between a sum of first numbers and a smaller one before it.
#include <algorithm>
#include <iostream>

int main() {
    int n;
    std::cin >> n;
    long long sum = 0, smallest = 0, best = -4'000'000'000'000'000'000LL;
    for (int i = 0; i < n; ++i) {
        long long number;
        std::cin >> number;
        sum += number;
        best = std::max(best, sum - smallest);
        smallest = std::min(smallest, sum);
    }
    std::cout << best << '\n';
}
