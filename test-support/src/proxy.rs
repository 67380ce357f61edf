//! A TCP proxy that breaks connections on command: the network between a client and a server.
//!
//! It stays on its port whatever happens to the server behind it, so that a server can go away and come
//! back without the client being told.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
};

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// `RST` to both sides, as from a router that lost its state. What is under way is lost.
    Reset,
    /// `FIN` to both sides, as from a server that closes in good order.
    Finish,
}

/// What the network does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weather {
    /// Connects and passes on.
    Fine,
    /// New connections are reset at once.
    Down,
    /// Connections stay, and nothing passes: what a client sees when packets vanish.
    Silent,
}

/// The proxy; ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    /// Where clients connect.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    /// The server.
    upstream: String,
    weather: watch::Sender<Weather>,
    /// How to end each open connection.
    open: Mutex<HashMap<u64, watch::Sender<Option<Cut>>>>,
    accepted: AtomicU64,
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, HashMap<u64, watch::Sender<Option<Cut>>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Proxy {
    /// Listens on a free port of loopback and connects to `upstream` (`host:port`) for every client.
    pub async fn start(upstream: &str) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream: upstream.to_owned(),
            weather: watch::Sender::new(Weather::Fine),
            open: Mutex::default(),
            accepted: AtomicU64::new(0),
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, accepting })
    }

    /// `127.0.0.1:port`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Connections that are open now.
    pub fn connections(&self) -> usize {
        self.shared.open().len()
    }

    /// Connections that were ever made.
    pub fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// Ends every connection; returns how many.
    pub fn cut_all(&self, how: Cut) -> usize {
        self.cut_some(how, |_| true)
    }

    /// Ends the connections that `wanted` picks by their number (they count from 1); returns how many.
    pub fn cut_some(&self, how: Cut, mut wanted: impl FnMut(u64) -> bool) -> usize {
        let open = self.shared.open();
        let mut numbers: Vec<&u64> = open.keys().collect();
        numbers.sort_unstable();
        let mut count = 0;
        for number in numbers {
            if wanted(*number) {
                open[number].send_replace(Some(how));
                count += 1;
            }
        }
        count
    }

    /// The server is gone: connections are reset, new ones too.
    pub fn go_down(&self) {
        self.shared.weather.send_replace(Weather::Down);
        self.cut_all(Cut::Reset);
    }

    /// Packets vanish: connections stay open, nothing passes, and no new one is answered.
    pub fn go_silent(&self) {
        self.shared.weather.send_replace(Weather::Silent);
    }

    /// Everything works again. Connections that were silent go on where they were.
    pub fn come_back(&self) {
        self.shared.weather.send_replace(Weather::Fine);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut_all(Cut::Reset);
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((client, _)) = listener.accept().await else { continue };
        if *shared.weather.borrow() == Weather::Down {
            let _ = client.set_zero_linger();
            continue;
        }
        let number = shared.accepted.fetch_add(1, Ordering::SeqCst) + 1;
        let (end, ended) = watch::channel(None);
        shared.open().insert(number, end);
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            serve(client, &shared, ended).await;
            shared.open().remove(&number);
        });
    }
}

/// One connection, until a side closes it or it is cut.
async fn serve(client: TcpStream, shared: &Shared, mut ended: watch::Receiver<Option<Cut>>) {
    let connecting = async {
        fine(&mut shared.weather.subscribe()).await;
        TcpStream::connect(&shared.upstream).await
    };
    let server = tokio::select! {
        server = connecting => server,
        _ = ended.changed() => return,
    };
    let Ok(server) = server else {
        let _ = client.set_zero_linger();
        return;
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let passing = async {
        tokio::try_join!(
            pass(&mut from_client, &mut to_server, shared.weather.subscribe()),
            pass(&mut from_server, &mut to_client, shared.weather.subscribe()),
        )
    };
    let cut = tokio::select! {
        // A side that was reset (a killed client with unread data) must not leave the other one waiting.
        passed = passing => passed.is_err().then_some(Cut::Reset),
        _ = ended.changed() => *ended.borrow(),
    };
    if cut == Some(Cut::Reset) {
        // Dropping a socket that must not linger sends RST; dropping its write half would send FIN first.
        let _ = (to_client.as_ref().set_zero_linger(), to_server.as_ref().set_zero_linger());
        to_client.forget();
        to_server.forget();
    }
}

/// Copies one direction while the weather is fine, until it ends.
async fn pass(
    from: &mut OwnedReadHalf,
    to: &mut OwnedWriteHalf,
    mut weather: watch::Receiver<Weather>,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return to.shutdown().await;
        }
        fine(&mut weather).await;
        to.write_all(&buffer[..read]).await?;
    }
}

/// Waits while packets vanish.
async fn fine(weather: &mut watch::Receiver<Weather>) {
    // The sender lives as long as anything that passes through.
    let _ = weather.wait_for(|weather| *weather != Weather::Silent).await;
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    /// An echo server and a proxy before it.
    async fn rig() -> Proxy {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let proxy = Proxy::start(&listener.local_addr().unwrap().to_string()).await.unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                });
            }
        });
        proxy
    }

    async fn echo(stream: &mut TcpStream) -> io::Result<()> {
        stream.write_all(b"ping").await?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await?;
        assert_eq!(&answer, b"ping");
        Ok(())
    }

    #[tokio::test]
    async fn a_client_that_is_reset_takes_its_servers_side_with_it() {
        let proxy = rig().await;
        let mut client = TcpStream::connect(proxy.address).await.unwrap();
        echo(&mut client).await.unwrap();
        client.set_zero_linger().unwrap();
        drop(client);
        let gone = async {
            while proxy.connections() > 0 {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(10), gone).await.unwrap();
    }

    #[tokio::test]
    async fn it_passes_cuts_and_comes_back() {
        let proxy = rig().await;
        let connect = || TcpStream::connect(proxy.address);
        let (mut reset, mut finished) = (connect().await.unwrap(), connect().await.unwrap());
        echo(&mut reset).await.unwrap();
        echo(&mut finished).await.unwrap();
        assert_eq!(proxy.cut_some(Cut::Reset, |number| number == 1), 1);
        assert_eq!(reset.read(&mut [0; 1]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        echo(&mut finished).await.unwrap();
        assert_eq!(proxy.cut_all(Cut::Finish), 1);
        assert_eq!(finished.read(&mut [0; 1]).await.unwrap(), 0, "a proper end");

        proxy.go_down();
        let mut refused = connect().await.unwrap();
        assert!(echo(&mut refused).await.is_err());
        proxy.come_back();
        let mut again = connect().await.unwrap();
        echo(&mut again).await.unwrap();

        proxy.go_silent();
        again.write_all(b"ping").await.unwrap();
        let mut answer = [0; 4];
        assert!(timeout(Duration::from_millis(100), again.read_exact(&mut answer)).await.is_err());
        proxy.come_back();
        again.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"ping", "late, not lost");
    }
}
