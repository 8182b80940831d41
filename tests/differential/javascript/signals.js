process.on("SIGUSR2", () => { console.log("handled"); process.kill(process.pid, "SIGTERM"); });
process.kill(process.pid, "SIGUSR2");
setTimeout(() => {}, 1000);
