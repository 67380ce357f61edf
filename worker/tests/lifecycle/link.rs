//! A connection that can be cut, or held up: what a broken dependency looks like from outside.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
};

/// Passes TCP connections on to `target`, while it is not cut.
pub(crate) struct Link {
    /// What the worker is told.
    pub(crate) addr: SocketAddr,
    target: SocketAddr,
    passing: JoinHandle<()>,
    cut: watch::Sender<bool>,
    held: watch::Sender<bool>,
}

impl Link {
    pub(crate) async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let cut = watch::Sender::new(false);
        let held = watch::Sender::new(false);
        let passing = tokio::spawn(pass(listener, target, cut.subscribe(), held.subscribe()));
        Self { addr, target, passing, cut, held }
    }

    /// Ends every connection and refuses new ones.
    pub(crate) async fn cut(&mut self) {
        self.cut.send_replace(true);
        // Ends with its listener closed, so that whoever connects from now on is refused.
        (&mut self.passing).await.unwrap();
    }

    /// Lets connections through again.
    pub(crate) async fn mend(&mut self) {
        self.cut.send_replace(false);
        let listener = TcpListener::bind(self.addr).await.unwrap();
        self.passing = tokio::spawn(pass(listener, self.target, self.cut.subscribe(), self.held.subscribe()));
    }

    /// Requests go through; answers stay here until they are let through.
    pub(crate) fn hold_answers(&self, held: bool) {
        self.held.send_replace(held);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.passing.abort();
    }
}

async fn pass(
    listener: TcpListener,
    target: SocketAddr,
    mut cut: watch::Receiver<bool>,
    held: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            // An error means that the link was dropped.
            _ = cut.wait_for(|cut| *cut) => return,
            accepted = listener.accept() => {
                connections.spawn(connect(accepted.unwrap().0, target, held.clone()));
            }
        }
    }
}

/// Passes one connection on until either side hangs up.
async fn connect(mut near: TcpStream, target: SocketAddr, mut held: watch::Receiver<bool>) {
    let Ok(mut far) = TcpStream::connect(target).await else { return };
    let (mut requests, mut caller) = near.split();
    let (mut answers, mut callee) = far.split();
    let back = async {
        let mut bytes = vec![0; 16 << 10];
        loop {
            let Ok(read @ 1..) = answers.read(&mut bytes).await else { return };
            if held.wait_for(|held| !held).await.is_err() || caller.write_all(&bytes[..read]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        _ = copy(&mut requests, &mut callee) => {}
        () = back => {}
    }
}
