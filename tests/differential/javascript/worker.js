const { Worker, isMainThread, parentPort } = require("worker_threads");
if (isMainThread) new Worker(__filename).on("message", (m) => console.log("got", m)).on("exit", (c) => console.log(c));
else parentPort.postMessage(6 * 7);
