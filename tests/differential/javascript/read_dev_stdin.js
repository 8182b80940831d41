// differential: {"stdin": "3 4\n"}
const [a, b] = require("fs").readFileSync("/dev/stdin").toString().trim().split(" ").map(Number);
console.log(a * b);
