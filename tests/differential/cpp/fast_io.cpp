// differential: {"stdin": "3\n1 2 3\n"}
#include <bits/stdc++.h>
int main() { std::ios::sync_with_stdio(false); std::cin.tie(nullptr); int n; std::cin >> n; std::vector<long long> v(n); for (auto &x : v) std::cin >> x; std::cout << std::accumulate(v.begin(), v.end(), 0LL) << '\n'; }
