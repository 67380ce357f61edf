//! Serves HTTP with a bound on what a client can hold without asking anything.
//!
//! A server of axum takes as many connections as there are, and waits for the rest of a request's head for as long
//! as the client keeps it open: a few hundred such connections use up the file descriptors. Here connections are
//! counted, the head of a request must come in time, and a connection that nobody uses ends.
//!
//! Bodies are not read here; whoever reads one bounds it (and does, see `GATEWAY_TIMEOUT_SECONDS`).

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    extract::{ConnectInfo, Request, connect_info::Connected},
    http::Version,
    middleware::{self, Next},
    response::Response,
    serve::{IncomingStream, Listener},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep},
};

/// What clients may hold.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionBounds {
    /// Connections at once; more wait in the system's queue until one ends.
    pub max: usize,
    /// From a connection's first moment, or a request's first byte, to the end of the request's head.
    pub head: Duration,
    /// How long a connection may be kept between two requests. Where all are taken, no longer than `head`.
    pub idle: Duration,
}

impl ConnectionBounds {
    /// For probes and metrics, which a few clients of the operator read.
    pub const OPS: Self = Self { max: 64, head: Duration::from_secs(10), idle: Duration::from_secs(650) };
}

/// Serves until `stop`, then finishes the requests under way. Handlers can extract `ConnectInfo<SocketAddr>`.
pub async fn serve<F>(
    listener: TcpListener,
    router: Router,
    bounds: ConnectionBounds,
    stop: F,
) -> io::Result<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = Bounded { listener, bounds, places: Arc::new(Semaphore::new(bounds.max)), crowded: false };
    let service = router.layer(middleware::from_fn(mark)).into_make_service_with_connect_info::<Peer>();
    axum::serve(listener, service).with_graceful_shutdown(stop).await
}

/// Counts connections.
struct Bounded {
    listener: TcpListener,
    bounds: ConnectionBounds,
    places: Arc<Semaphore>,
    /// All were taken when the last one came; for saying it once.
    crowded: bool,
}

impl Listener for Bounded {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let crowded = self.places.available_permits() == 0;
        if crowded && !self.crowded {
            tracing::warn!(connections = self.bounds.max, "all connections are taken, others wait");
        }
        self.crowded = crowded;
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        let (stream, address) = Listener::accept(&mut self.listener).await;
        let connection = Connection {
            stream,
            usage: Arc::new(Usage::new()),
            bounds: self.bounds,
            places: Arc::clone(&self.places),
            timer: Box::pin(tokio::time::sleep(self.bounds.head)),
            _place: place,
        };
        (connection, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// What a connection is used for at the moment; shared between its stream and the requests that came by it.
#[derive(Debug)]
struct Usage(Mutex<Moment>);

#[derive(Debug)]
struct Moment {
    /// Requests that are being answered; HTTP/2 can have several.
    under_way: usize,
    /// A request's head has begun (or the connection itself), and its end has not come yet.
    in_head: bool,
    /// HTTP/2 sends frames that belong to no request.
    http2: bool,
    /// Since when it is as it is.
    since: Instant,
}

impl Usage {
    fn new() -> Self {
        Self(Mutex::new(Moment { under_way: 0, in_head: true, http2: false, since: Instant::now() }))
    }

    fn moment(&self) -> MutexGuard<'_, Moment> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes came.
    fn read(&self) {
        let mut moment = self.moment();
        if moment.under_way > 0 || moment.in_head {
            return;
        }
        moment.in_head = !moment.http2;
        moment.since = Instant::now();
    }
}

/// A request that is being answered.
struct UnderWay(Arc<Usage>);

impl UnderWay {
    fn begin(connection: Arc<Usage>, version: Version) -> Self {
        let mut moment = connection.moment();
        moment.under_way += 1;
        moment.in_head = false;
        moment.http2 |= version == Version::HTTP_2;
        drop(moment);
        Self(connection)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut moment = self.0.moment();
        moment.under_way -= 1;
        moment.since = Instant::now();
    }
}

/// Who is at the other end, for the layer that marks requests.
#[derive(Clone, Debug)]
struct Peer {
    address: SocketAddr,
    connection: Arc<Usage>,
}

impl Connected<IncomingStream<'_, Bounded>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Bounded>) -> Self {
        Self { address: *stream.remote_addr(), connection: Arc::clone(&stream.io().usage) }
    }
}

async fn mark(ConnectInfo(peer): ConnectInfo<Peer>, mut request: Request, next: Next) -> Response {
    request.extensions_mut().insert(ConnectInfo(peer.address));
    let _under_way = UnderWay::begin(peer.connection, request.version());
    next.run(request).await
}

/// A connection that ends by itself when its time is over.
struct Connection {
    stream: TcpStream,
    usage: Arc<Usage>,
    bounds: ConnectionBounds,
    places: Arc<Semaphore>,
    timer: Pin<Box<Sleep>>,
    _place: Option<OwnedSemaphorePermit>,
}

impl Connection {
    /// Called where the client lets us wait: an error once it has had its time. Wakes the task by then.
    fn overdue<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        let (in_head, since) = {
            let moment = self.usage.moment();
            if moment.under_way > 0 {
                return Poll::Pending;
            }
            (moment.in_head, moment.since)
        };
        let ConnectionBounds { head, idle, .. } = self.bounds;
        loop {
            let now = Instant::now();
            let waited = now.duration_since(since);
            let crowded = self.places.available_permits() == 0;
            let patience = if in_head || crowded { head.min(idle) } else { idle };
            if waited >= patience {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            // An idle connection looks more often than it must: whether all are taken by now.
            let next = (since + patience).min(now + head);
            if self.timer.is_elapsed() || self.timer.deadline() > next || self.timer.deadline() <= now {
                self.timer.as_mut().reset(next);
            }
            std::task::ready!(self.timer.as_mut().poll(cx));
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        match Pin::new(&mut self.stream).poll_read(cx, buf) {
            Poll::Pending => self.overdue(cx),
            Poll::Ready(result) => {
                if buf.filled().len() > before {
                    self.usage.read();
                }
                Poll::Ready(result)
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write(cx, buf) {
            Poll::Pending => self.overdue(cx),
            ready @ Poll::Ready(_) => ready,
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write_vectored(cx, bufs) {
            Poll::Pending => self.overdue(cx),
            ready @ Poll::Ready(_) => ready,
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
mod tests {
    use axum::{body::Bytes, routing::post};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        sync::oneshot,
        task::JoinHandle,
        time::timeout,
    };

    use super::*;

    /// Bound of waiting for what must happen.
    const SOON: Duration = Duration::from_secs(20);
    const HEAD: Duration = Duration::from_millis(300);
    const LONG: Duration = Duration::from_hours(1);

    struct Server {
        address: SocketAddr,
        stop: oneshot::Sender<()>,
        served: JoinHandle<io::Result<()>>,
    }

    async fn server(max: usize, idle: Duration) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let router = Router::new().route(
            "/",
            post(async |ConnectInfo(peer): ConnectInfo<SocketAddr>, body: Bytes| {
                format!("{} sent {}", peer.ip(), body.len())
            }),
        );
        let bounds = ConnectionBounds { max, head: HEAD, idle };
        let served = tokio::spawn(serve(listener, router, bounds, async {
            let _ = stopped.await;
        }));
        Server { address, stop, served }
    }

    impl Server {
        async fn connect(&self) -> TcpStream {
            TcpStream::connect(self.address).await.unwrap()
        }
    }

    /// Everything up to the answer's end, which our handler's answers have in common.
    async fn answer(stream: &mut TcpStream) -> String {
        let mut text = String::new();
        let mut buffer = [0; 1024];
        while !text.contains("127.0.0.1 sent ") {
            let read = timeout(SOON, stream.read(&mut buffer)).await.unwrap().unwrap();
            assert!(read > 0, "closed after {text:?}");
            text.push_str(std::str::from_utf8(&buffer[..read]).unwrap());
        }
        text
    }

    /// Waits until the server closes.
    async fn closed(mut stream: TcpStream) -> Vec<u8> {
        let mut rest = Vec::new();
        let _ = timeout(SOON, stream.read_to_end(&mut rest)).await.expect("the server closes it");
        rest
    }

    const REQUEST: &[u8] = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nab";

    #[tokio::test]
    async fn half_a_head_is_not_waited_for() {
        let server = server(16, LONG).await;
        for begun in ["", "G", "GET /v1/coll", "GET / HTTP/1.1\r\nhost: x\r\n", "PRI * HTTP/2.0\r\n"] {
            let mut stream = server.connect().await;
            stream.write_all(begun.as_bytes()).await.unwrap();
            assert_eq!(closed(stream).await, b"", "{begun:?}");
        }
    }

    #[tokio::test]
    async fn half_a_second_head_is_not_waited_for_either() {
        let server = server(16, LONG).await;
        let mut stream = server.connect().await;
        stream.write_all(REQUEST).await.unwrap();
        assert!(answer(&mut stream).await.ends_with("127.0.0.1 sent 2"));
        stream.write_all(b"GET /v1/coll").await.unwrap();
        closed(stream).await;
    }

    #[tokio::test]
    async fn a_connection_between_two_requests_is_kept() {
        let server = server(16, LONG).await;
        let mut kept = server.connect().await;
        kept.write_all(REQUEST).await.unwrap();
        answer(&mut kept).await;
        // Two that are held to the time of a head have come and gone meanwhile.
        for _ in 0..2 {
            closed(server.connect().await).await;
        }
        kept.write_all(REQUEST).await.unwrap();
        assert!(answer(&mut kept).await.ends_with("127.0.0.1 sent 2"));
    }

    #[tokio::test]
    async fn a_body_has_the_time_that_its_reader_gives_it() {
        let server = server(16, LONG).await;
        let mut slow = server.connect().await;
        slow.write_all(&REQUEST[..REQUEST.len() - 2]).await.unwrap();
        for byte in [b"a", b"b"] {
            closed(server.connect().await).await;
            slow.write_all(byte).await.unwrap();
        }
        assert!(answer(&mut slow).await.ends_with("127.0.0.1 sent 2"));
    }

    #[tokio::test]
    async fn an_unused_connection_ends() {
        let server = server(16, HEAD).await;
        let mut stream = server.connect().await;
        stream.write_all(REQUEST).await.unwrap();
        answer(&mut stream).await;
        closed(stream).await;
    }

    #[tokio::test]
    async fn where_all_connections_are_taken_unused_ones_make_room() {
        let server = server(2, LONG).await;
        let mut kept = Vec::new();
        for _ in 0..2 {
            let mut stream = server.connect().await;
            stream.write_all(REQUEST).await.unwrap();
            answer(&mut stream).await;
            kept.push(stream);
        }
        let mut third = server.connect().await;
        third.write_all(REQUEST).await.unwrap();
        assert!(answer(&mut third).await.ends_with("127.0.0.1 sent 2"));
    }

    #[tokio::test]
    async fn a_request_under_way_is_finished_before_the_server_ends() {
        let server = server(16, LONG).await;
        let mut idle = server.connect().await;
        idle.write_all(REQUEST).await.unwrap();
        answer(&mut idle).await;
        let mut busy = server.connect().await;
        busy.write_all(&REQUEST[..REQUEST.len() - 1]).await.unwrap();
        // Its head was read when the server answers what came later.
        let mut later = server.connect().await;
        later.write_all(REQUEST).await.unwrap();
        answer(&mut later).await;
        server.stop.send(()).unwrap();
        closed(idle).await;
        busy.write_all(b"b").await.unwrap();
        assert!(answer(&mut busy).await.ends_with("127.0.0.1 sent 2"));
        timeout(SOON, server.served).await.unwrap().unwrap().unwrap();
    }
}
