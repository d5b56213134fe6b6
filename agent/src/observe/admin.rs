//! The admin API on a unix socket: tables and flow events, for the commands of the same binary.

use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::events::{EventLog, Filter};
use super::tables::Table;
use crate::drain::Drain;

/// Generated from `proto/admin.proto`.
#[allow(clippy::all, unreachable_pub, unused_qualifications)]
pub mod proto {
    tonic::include_proto!("weft.admin.v1");
}

use proto::admin_server::{Admin, AdminServer};
use proto::{ObserveRequest, ObserveResponse, ShowRequest, ShowResponse};

/// A table may be this long on the wire: 100,000 workloads need about 30 MB.
pub const MAX_MESSAGE: usize = 256 << 20;

/// Renders one table as JSON.
pub type Show = Arc<dyn Fn(Table) -> anyhow::Result<Vec<u8>> + Send + Sync>;

/// A bound socket, removed from the file system when dropped.
#[derive(Debug)]
pub struct Socket {
    listener: Option<UnixListener>,
    path: PathBuf,
}

impl Socket {
    /// Binds `path` with mode 0600. A socket file that nobody listens on any more is replaced; a living agent is not.
    pub async fn bind(path: &Path) -> io::Result<Socket> {
        if let Some(parent) = path.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        }
        match UnixStream::connect(path).await {
            Ok(_) => {
                return Err(io::Error::new(io::ErrorKind::AddrInUse, "another agent is listening there"));
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        // Bound under another name and renamed, so that it is never there with wider permissions.
        let early = path.with_extension(format!("{}.new", std::process::id()));
        let _ = std::fs::remove_file(&early);
        let listener = UnixListener::bind(&early)?;
        let placed = std::fs::set_permissions(&early, std::fs::Permissions::from_mode(0o600))
            .and_then(|()| std::fs::rename(&early, path));
        if let Err(error) = placed {
            let _ = std::fs::remove_file(&early);
            return Err(error);
        }
        Ok(Socket { listener: Some(listener), path: path.to_owned() })
    }

    /// Serves until the drain begins.
    pub async fn serve(mut self, show: Show, events: Arc<EventLog>, drain: Drain) -> anyhow::Result<()> {
        let listener = self.listener.take().expect("the listener is taken here only");
        let service = AdminServer::new(Service { show, events, drain: drain.clone() })
            .max_encoding_message_size(MAX_MESSAGE);
        // Not waited for: `observe --follow` has no end of its own.
        tokio::select! {
            served = Server::builder()
                .concurrency_limit_per_connection(16)
                .add_service(service)
                .serve_with_incoming(UnixListenerStream::new(listener)) => Ok(served?),
            () = drain.begun() => Ok(()),
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

struct Service {
    show: Show,
    events: Arc<EventLog>,
    drain: Drain,
}

#[tonic::async_trait]
impl Admin for Service {
    async fn show(&self, request: Request<ShowRequest>) -> Result<Response<ShowResponse>, Status> {
        let name = request.into_inner().table;
        let table = Table::from_name(&name)
            .ok_or_else(|| Status::not_found(format!("there is no table `{name}`")))?;
        let show = self.show.clone();
        // Reads maps and formats rows: work for a thread that carries no connection.
        let json = tokio::task::spawn_blocking(move || show(table))
            .await
            .map_err(|_| Status::internal("the table could not be made; the agent's log says why"))?
            .map_err(|error| Status::internal(format!("{error:#}")))?;
        Ok(Response::new(ShowResponse { json }))
    }

    type ObserveStream = Pin<Box<dyn Stream<Item = Result<ObserveResponse, Status>> + Send>>;

    async fn observe(
        &self,
        request: Request<ObserveRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        let ObserveRequest { follow, from, to, verdict } = request.into_inner();
        let some = |text: String| (!text.is_empty()).then_some(text);
        let filter = Filter { from: some(from), to: some(to), verdict: some(verdict) };
        let (remembered, mut live) = self
            .events
            .subscribe()
            .ok_or_else(|| Status::resource_exhausted("too many are watching already; end one of them"))?;
        let (sender, receiver) = mpsc::channel(64);
        let drain = self.drain.clone();
        // Ends with the stream: a failed send, or the drain.
        tokio::spawn(async move {
            for event in remembered {
                if filter.selects(&event) && sender.send(message(&event, 0)).await.is_err() {
                    return;
                }
            }
            if !follow {
                return;
            }
            let mut lost = 0;
            loop {
                let next = tokio::select! {
                    next = live.recv() => next,
                    () = sender.closed() => return,
                    () = drain.begun() => return,
                };
                match next {
                    Ok(event) if filter.selects(&event) => {
                        if sender.send(message(&event, std::mem::take(&mut lost))).await.is_err() {
                            return;
                        }
                    }
                    Ok(_) => {}
                    Err(RecvError::Lagged(count)) => lost += count,
                    Err(RecvError::Closed) => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver).map(Ok))))
    }
}

fn message(event: &super::events::FlowEvent, lost: u64) -> ObserveResponse {
    ObserveResponse { json: serde_json::to_vec(event).expect("an event is plain data"), lost }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::client;
    use crate::observe::events::{FlowEvent, Party};

    #[tokio::test]
    async fn tables_and_events_travel() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("run/agent.sock");
        let socket = Socket::bind(&path).await.expect("bound");
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        assert_eq!(
            Socket::bind(&path).await.expect_err("a living agent keeps it").kind(),
            io::ErrorKind::AddrInUse
        );
        let events = Arc::new(EventLog::default());
        let from = |workload: &str| Party { workload: workload.into(), ..Party::default() };
        events.push(FlowEvent { from: from("a/b"), ..FlowEvent::default() });
        events.push(FlowEvent { from: from("a/c"), ..FlowEvent::default() });
        let (drainer, drain) = crate::drain::channel();
        let show: Show = Arc::new(|table| match table {
            Table::Certs => anyhow::bail!("no certificates today"),
            table => Ok(serde_json::to_vec(&[table.name()])?),
        });
        let server = tokio::spawn(socket.serve(show, events, drain));

        let shown: Vec<String> = client::show(&path, Table::Workloads).await.expect("shown");
        assert_eq!(shown, ["workloads"]);
        let error = client::show::<Vec<String>>(&path, Table::Certs).await.expect_err("it failed");
        assert!(format!("{error:#}").contains("no certificates today"));
        let mut seen = Vec::new();
        let request = ObserveRequest { from: "a/c".into(), ..ObserveRequest::default() };
        client::observe(&path, request, |event, lost| {
            assert_eq!(lost, 0);
            seen.push(event.from.workload);
            Ok(())
        })
        .await
        .expect("observed");
        assert_eq!(seen, ["a/c"]);

        assert!(drainer.drain(std::time::Duration::from_secs(2)).await);
        server.await.expect("no panic").expect("served");
        assert!(!path.exists());
        let error = client::show::<Vec<String>>(&path, Table::Certs).await.expect_err("nobody listens");
        assert!(format!("{error:#}").contains("no agent"), "{error:#}");
    }
}
