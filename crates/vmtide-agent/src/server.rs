//! Connections: accepted, bounded, made private, answered, and ended in order.
//!
//! What a connection may cost before anybody has shown a key is bounded in four ways: how many there are, in all
//! and per address; how long a handshake and the head of a request may take; how long a client may leave an
//! answer lying ([`StallGuard`](crate::stall::StallGuard), and over HTTP/2 each answer by itself, `stall_body`); and
//! how much is buffered for each. Everything past
//! that is refused by closing, which costs nothing.
//!
//! Answers are large: a disk is streamed in frames of up to a megabyte. So the buffers between a frame and the
//! socket are as large, nothing is flattened into one buffer (`writev`), and TLS takes whole frames at once.

use crate::config::ConnectionLimits;
use crate::count::Count;
use crate::stall::StallGuard;
use crate::state::Shared;
use crate::{audit, contract, drain, metrics, stall_body, v1};
use axum::Router;
use axum::middleware::{from_fn_with_state, map_request};
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use parking_lot::Mutex;
use rustls::ServerConfig;
use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tower::Service;

/// What is buffered between a body and the socket, and between TLS and the socket, per connection that streams.
/// Smaller costs system calls: at 64 KiB, rustls' default, a third of the throughput. Larger costs memory only.
const WRITE_BUFFER_BYTES: usize = 1 << 20;
/// The most bytes of a request's head: the longest address that the HTTP library takes, and its headers.
const MAX_HEAD_BYTES: usize = 128 << 10;
/// The most requests at once over one HTTP/2 connection.
const MAX_STREAMS: u32 = 64;
/// How often an HTTP/2 client is asked whether it still lives.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// How long accepting pauses where the system has no more handles, instead of asking again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Who sent a request; an extension of every request.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// All that the agent answers.
pub fn router(state: Shared) -> Router {
    Router::new()
        .merge(contract::router())
        .merge(v1::router(&state))
        .fallback(contract::unknown)
        .layer(from_fn_with_state(Arc::clone(&state), metrics::record))
        .layer(from_fn_with_state(Arc::clone(&state), audit::record))
        .layer(map_request(drain::wrap))
        .with_state(state)
}

/// Serves `router` over TLS until `stop` becomes true, then lets running requests end. Its connections are counted in
/// `open`.
///
/// # Panics
/// Outside of a tokio runtime.
pub async fn serve(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    router: Router,
    limits: ConnectionLimits,
    open: Count,
    mut stop: watch::Receiver<bool>,
) {
    let graceful = GracefulShutdown::new();
    let connections = Connections::new(limits);
    let acceptor = TlsAcceptor::from(tls);
    let mut tasks = JoinSet::new();
    if let Err(error) = send_unpaced_to_this_machine(&listener) {
        tracing::debug!(%error, "the congestion control could not be set");
    }
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => break,
            Some(_) = tasks.join_next() => continue,
        };
        match accepted {
            Ok((stream, peer)) => {
                let Some(place) = connections.enter(peer.ip()) else {
                    tracing::debug!(%peer, "refused: too many connections");
                    continue;
                };
                let counted = open.enter();
                let connection = Connection {
                    acceptor: acceptor.clone(),
                    router: router.clone(),
                    limits,
                    peer,
                    watcher: graceful.watcher(),
                };
                tasks.spawn(async move {
                    connection.serve(stream).await;
                    drop((place, counted));
                });
            }
            Err(error) => {
                // A client that went away before it was accepted, or no handles left: others will come.
                tracing::debug!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    if tokio::time::timeout(limits.drain_timeout, graceful.shutdown()).await.is_err() {
        tracing::warn!("some requests did not end in time and were cut off");
    }
    tasks.shutdown().await;
}

/// One connection before it is answered.
struct Connection {
    acceptor: TlsAcceptor,
    router: Router,
    limits: ConnectionLimits,
    peer: SocketAddr,
    watcher: Watcher,
}

impl Connection {
    async fn serve(self, stream: TcpStream) {
        let peer = self.peer;
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%peer, %error, "no delay could not be set");
        }
        let guarded = StallGuard::new(stream, self.limits.stall_timeout);
        let handshake = self.acceptor.accept_with(guarded, |session| {
            session.set_buffer_limit(Some(WRITE_BUFFER_BYTES));
        });
        match tokio::time::timeout(self.limits.handshake_timeout, handshake).await {
            Ok(Ok(stream)) => self.answer(stream).await,
            Ok(Err(error)) => tracing::debug!(%peer, %error, "no TLS"),
            Err(_) => tracing::debug!(%peer, "the TLS handshake took too long"),
        }
    }

    async fn answer(self, stream: TlsStream<StallGuard<TcpStream>>) {
        let peer = self.peer;
        let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let io = TokioIo::new(stream);
        let router = self.router;
        let timeout = is_http2.then_some(self.limits.stall_timeout);
        let service = service_fn(move |request| answer(router.clone(), peer, timeout, request));
        let ended = if is_http2 {
            let connection = http2(&self.limits).serve_connection(io, service);
            self.watcher.watch(connection).await
        } else {
            let connection = http1(&self.limits).serve_connection(io, service);
            self.watcher.watch(connection).await
        };
        if let Err(error) = ended {
            tracing::debug!(%peer, %error, "the connection ended early");
        }
    }
}

/// Takes another congestion control than BBR, which some systems have for all connections, where the agent listens to its own machine
/// only. BBR sends by a timer, to spare queues in a network; here there is none, and the timer runs on the client's core and takes a
/// sixth of it (`docs/decisions/0016-the-agent.md`). Reno has no timer, and every Linux has it and leaves it to everybody. A
/// connection has it from the listener: one that began with BBR keeps the timer.
#[cfg(target_os = "linux")]
fn send_unpaced_to_this_machine(listener: &TcpListener) -> std::io::Result<()> {
    if listener.local_addr()?.ip().to_canonical().is_loopback() {
        rustix::net::sockopt::set_tcp_congestion(listener, "reno")?;
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn send_unpaced_to_this_machine(_: &TcpListener) -> std::io::Result<()> {
    Ok(())
}

async fn answer(
    mut router: Router,
    peer: SocketAddr,
    stall_timeout: Option<Duration>,
    mut request: Request<Incoming>,
) -> Result<Response<axum::body::Body>, Infallible> {
    request.extensions_mut().insert(Peer(peer));
    let response = router.call(request).await?;
    Ok(match stall_timeout {
        Some(timeout) => response.map(|body| stall_body::guard(body, timeout)),
        None => response,
    })
}

fn http1(limits: &ConnectionLimits) -> hyper::server::conn::http1::Builder {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_header_size(MAX_HEAD_BYTES)
        .max_buf_size(WRITE_BUFFER_BYTES)
        .writev(true);
    builder
}

fn http2(limits: &ConnectionLimits) -> hyper::server::conn::http2::Builder<TokioExecutor> {
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(u32::try_from(MAX_HEAD_BYTES).unwrap_or(u32::MAX))
        .max_send_buf_size(WRITE_BUFFER_BYTES)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(limits.header_timeout);
    builder
}

/// How many connections there are, in all and of each address.
#[derive(Clone)]
struct Connections {
    limits: ConnectionLimits,
    counts: Arc<Mutex<Counts>>,
}

#[derive(Default)]
struct Counts {
    total: usize,
    of_peer: HashMap<IpAddr, usize>,
}

/// The place of one connection; given back when it is dropped.
struct Place {
    connections: Connections,
    peer: IpAddr,
}

impl Connections {
    fn new(limits: ConnectionLimits) -> Self {
        Self { limits, counts: Arc::default() }
    }

    fn enter(&self, peer: IpAddr) -> Option<Place> {
        let mut counts = self.counts.lock();
        let of_peer = counts.of_peer.get(&peer).copied().unwrap_or(0);
        if counts.total >= self.limits.total || of_peer >= self.limits.per_peer {
            return None;
        }
        counts.total += 1;
        counts.of_peer.insert(peer, of_peer + 1);
        Some(Place { connections: self.clone(), peer })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.connections.counts.lock();
        counts.total = counts.total.saturating_sub(1);
        if let Some(of_peer) = counts.of_peer.get_mut(&self.peer) {
            *of_peer = of_peer.saturating_sub(1);
            if *of_peer == 0 {
                counts.of_peer.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_in_all_and_per_address_and_given_back() {
        let limits = ConnectionLimits { total: 3, per_peer: 2, ..ConnectionLimits::default() };
        let connections = Connections::new(limits);
        let one: IpAddr = "10.0.0.1".parse().unwrap();
        let other: IpAddr = "10.0.0.2".parse().unwrap();
        let first = connections.enter(one).unwrap();
        let _second = connections.enter(one).unwrap();
        assert!(connections.enter(one).is_none());
        let third = connections.enter(other).unwrap();
        assert!(connections.enter(other).is_none());
        drop(first);
        let _fourth = connections.enter(one).unwrap();
        drop(third);
        assert!(!connections.counts.lock().of_peer.contains_key(&other));
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn who_listens_to_this_machine_only_sends_without_a_timer() {
        use rustix::net::sockopt::{set_tcp_congestion, tcp_congestion};
        for address in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0"] {
            let Ok(listener) = TcpListener::bind(address).await else {
                assert!(
                    address.starts_with('['),
                    "not every machine has IPv6, but this is the other"
                );
                continue;
            };
            // Where the system permits another; everywhere else this cannot tell the one from the other.
            let _ = set_tcp_congestion(&listener, "cubic")
                .or_else(|_| set_tcp_congestion(&listener, "bbr"));
            let before = tcp_congestion(&listener).unwrap();
            send_unpaced_to_this_machine(&listener).unwrap();
            let port = listener.local_addr().unwrap().port();
            let host = if address.starts_with('[') { "::1" } else { "127.0.0.1" };
            let (client, accepted) =
                tokio::join!(TcpStream::connect((host, port)), listener.accept());
            let wanted = if address.starts_with('0') { before } else { "reno".into() };
            assert_eq!(tcp_congestion(&accepted.unwrap().0).unwrap(), wanted, "{address}");
            drop(client);
        }
    }
}
