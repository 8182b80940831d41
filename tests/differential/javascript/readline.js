// differential: {"stdin": "one\ntwo\nthree"}
const rl = require("readline").createInterface({ input: process.stdin, terminal: false });
let n = 0;
rl.on("line", (line) => console.log(++n, line)).on("close", () => console.log("closed"));
