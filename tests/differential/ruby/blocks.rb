puts (1..5).each_slice(2).map(&:sum).inspect, %w[b a].sort.inspect, [3, 1].minmax.inspect, (1..Float::INFINITY).lazy.select(&:even?).first(2).inspect
