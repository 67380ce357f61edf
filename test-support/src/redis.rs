//! A Redis server of a test's own, on loopback, that keeps nothing on disk.

use std::{
    net::{Ipv4Addr, TcpListener, TcpStream},
    process::Stdio,
    time::Duration,
};

use crate::guard::Guarded;

/// How long Redis may take to come up.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A running Redis; it ends when this is dropped, or with the test process.
#[derive(Debug)]
pub struct Redis {
    port: u16,
    _server: Guarded,
}

impl Redis {
    /// Starts one. `Err` says why there can be none on this machine (Debian package `redis-server`).
    pub async fn start() -> Result<Self, String> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .map_err(|error| error.to_string())?
            .port();
        Self::start_on(port).await
    }

    /// The same on a port that an earlier one had: it comes back empty.
    pub async fn start_on(port: u16) -> Result<Self, String> {
        let found = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .any(|dir| dir.join("redis-server").is_file());
        if !found {
            return Err("redis-server is not installed (Debian package `redis-server`)".to_owned());
        }
        let port_text = port.to_string();
        let args = [
            "--port",
            port_text.as_str(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            "/",
        ];
        let server = Guarded::spawn("redis-server", args, |command| {
            command.stdout(Stdio::null()).stderr(Stdio::null());
        })
        .map_err(|error| error.to_string())?;
        let deadline = tokio::time::Instant::now() + START_TIMEOUT;
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            if tokio::time::Instant::now() > deadline {
                return Err("redis-server did not come up".to_owned());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(Self { port, _server: server })
    }

    /// For `REDIS_URL`.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }

    /// Where it listens, for [`Redis::start_on`].
    pub fn port(&self) -> u16 {
        self.port
    }
}
