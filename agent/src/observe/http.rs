//! Metrics and readiness over HTTP/1.1: `/metrics`, `/ready` and `/healthz`, for Prometheus and probes.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::drain::Drain;
use crate::supervise::Ready;

/// Requests are read for so long at most.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections at a time; a scraper needs one.
const MAX_CONNECTIONS: usize = 64;

/// Writes the metrics page.
pub type Scrape = Arc<dyn Fn() -> anyhow::Result<String> + Send + Sync>;

/// Serves until the drain begins.
pub async fn serve(listener: TcpListener, scrape: Scrape, ready: Ready, drain: Drain) -> anyhow::Result<()> {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let place = places.clone().acquire_owned().await?;
        let stream = tokio::select! {
            () = drain.begun() => return Ok(()),
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // The listener itself is fine; what lacks is descriptors or memory, or the peer has gone.
                    if !is_peer(&error) {
                        tracing::warn!("metrics: a connection could not be accepted: {error}");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                    continue;
                }
            },
        };
        while connections.try_join_next().is_some() {}
        let (scrape, ready) = (scrape.clone(), ready.clone());
        connections.spawn(async move {
            let service = service_fn(move |request| answer(request, scrape.clone(), ready.clone()));
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_buf_size(16 << 10)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!("metrics: {error}");
            }
            drop(place);
        });
    }
}

fn is_peer(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)
}

async fn answer(
    request: Request<Incoming>,
    scrape: Scrape,
    ready: Ready,
) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.method() != Method::GET {
        return Ok(plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".into()));
    }
    Ok(match request.uri().path() {
        "/metrics" => match tokio::task::spawn_blocking(move || scrape()).await {
            Ok(Ok(page)) => {
                let mut response = plain(StatusCode::OK, page);
                let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
                response
            }
            Ok(Err(error)) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")),
            Err(_) => plain(StatusCode::INTERNAL_SERVER_ERROR, "the page could not be made\n".into()),
        },
        "/ready" if ready.is_ready() => plain(StatusCode::OK, "ready\n".into()),
        "/ready" => plain(StatusCode::SERVICE_UNAVAILABLE, "not ready\n".into()),
        "/healthz" => plain(StatusCode::OK, "ok\n".into()),
        _ => plain(StatusCode::NOT_FOUND, "there are /metrics, /ready and /healthz\n".into()),
    })
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn get(address: std::net::SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.expect("it listens");
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("written");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answered");
        answer
    }

    #[tokio::test]
    async fn pages() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let ready = Ready::default();
        let guard = ready.guard();
        let (drainer, drain) = crate::drain::channel();
        let server = tokio::spawn(serve(listener, Arc::new(|| Ok("x 1\n# EOF\n".into())), ready, drain));
        let page = get(address, "/metrics").await;
        assert!(page.starts_with("HTTP/1.1 200") && page.ends_with("x 1\n# EOF\n"), "{page}");
        assert!(get(address, "/ready").await.starts_with("HTTP/1.1 503"));
        drop(guard);
        assert!(get(address, "/ready").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/secret").await.starts_with("HTTP/1.1 404"));
        assert!(drainer.drain(Duration::from_secs(1)).await);
        server.await.expect("no panic").expect("served");
    }
}
