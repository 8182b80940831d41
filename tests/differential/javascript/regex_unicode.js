console.log("a1b22".replace(/\d+/g, (m) => m * 2), "x-y".split("-"), /(?<n>\w)/.exec("q").groups.n, "😀".codePointAt(0), [..."😀é"].length, "ß".toUpperCase(), "a".localeCompare("B"));
