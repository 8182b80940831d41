Promise.reject(new Error("lost"));
