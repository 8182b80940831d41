#include <algorithm>
#include <iostream>
#include <vector>

int main() {
    int n, m;
    std::cin >> n >> m;
    std::vector<int> from(m), to(m), length(m);
    for (int i = 0; i < m; ++i) std::cin >> from[i] >> to[i] >> length[i];
    const int far = 1'000'000'000;
    std::vector<int> distance(n + 1, far);
    distance[1] = 0;
    for (bool changed = true; changed;) {
        changed = false;
        for (int i = 0; i < m; ++i) {
            int best = std::min(distance[from[i]], distance[to[i]]) + length[i];
            for (int place : {from[i], to[i]}) {
                if (best < distance[place]) {
                    distance[place] = best;
                    changed = true;
                }
            }
        }
    }
    std::cout << (distance[n] < far ? distance[n] : -1) << '\n';
}
