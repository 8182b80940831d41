#include <iostream>
#include <set>
#include <utility>
#include <vector>

int main() {
    int n, m;
    std::cin >> n >> m;
    std::vector<std::vector<std::pair<int, int>>> roads(n + 1);
    for (int i = 0; i < m; ++i) {
        int u, v, length;
        std::cin >> u >> v >> length;
        roads[u].push_back({v, length});
        roads[v].push_back({u, length});
    }
    std::vector<int> distance(n + 1, -1);
    std::set<std::pair<int, int>> waiting{{0, 1}};
    while (!waiting.empty()) {
        auto [so_far, place] = *waiting.begin();
        waiting.erase(waiting.begin());
        if (distance[place] >= 0) continue;
        distance[place] = so_far;
        for (auto [other, length] : roads[place]) waiting.insert({so_far + length, other});
    }
    std::cout << distance[n] << '\n';
}
