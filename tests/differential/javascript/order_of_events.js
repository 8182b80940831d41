setTimeout(() => console.log("timeout"), 0);
setImmediate(() => console.log("immediate"));
process.nextTick(() => console.log("tick"));
Promise.resolve().then(() => console.log("micro"));
process.on("exit", (c) => console.log("exit", c));
console.log("sync");
