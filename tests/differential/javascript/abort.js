console.log("x"); process.abort();
