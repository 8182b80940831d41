// differential: {"stdin": "hello"}
process.stdin.setEncoding("utf8");
let data = "";
process.stdin.on("data", (d) => (data += d)).on("end", () => console.log(data.toUpperCase()));
