//! Talks to the agent's admin socket.

use std::future::Future;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::observe::admin::MAX_MESSAGE;
use crate::observe::admin::proto::admin_client::AdminClient;
use crate::observe::admin::proto::{ObserveRequest, ShowRequest};
use crate::observe::events::FlowEvent;
use crate::observe::tables::Table;

/// Asks for one table.
pub async fn show<T: DeserializeOwned>(socket: &Path, table: Table) -> anyhow::Result<T> {
    let request = ShowRequest { table: table.name().into() };
    let response = connect(socket).await?.show(request).await.map_err(sentence)?;
    serde_json::from_slice(&response.into_inner().json)
        .context("the agent answered in another form; are agent and command of the same version?")
}

/// Calls `each` with every event and the number of those lost before it.
pub async fn observe(
    socket: &Path,
    request: ObserveRequest,
    mut each: impl FnMut(FlowEvent, u64) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut events = connect(socket).await?.observe(request).await.map_err(sentence)?.into_inner();
    while let Some(message) = events.message().await.map_err(sentence)? {
        each(serde_json::from_slice(&message.json).context("an event of another version")?, message.lost)?;
    }
    Ok(())
}

/// Runs a command's future to its end.
pub fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}

async fn connect(path: &Path) -> anyhow::Result<AdminClient<Channel>> {
    if let Err(error) = UnixStream::connect(path).await {
        match error.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
                bail!("no agent is listening on {}; start one or pass --admin-socket", path.display())
            }
            std::io::ErrorKind::PermissionDenied => bail!("{} is for root only; use sudo", path.display()),
            _ => bail!("cannot connect to {}: {error}", path.display()),
        }
    }
    let path = PathBuf::from(path);
    // The URI is not used, but an endpoint must have one.
    let channel = Endpoint::from_static("http://agent")
        .connect_with_connector(ConnectUnix(path))
        .await
        .context("the agent closed the connection")?;
    Ok(AdminClient::new(channel).max_decoding_message_size(MAX_MESSAGE))
}

#[derive(Clone)]
struct ConnectUnix(PathBuf);

impl tower::Service<http::Uri> for ConnectUnix {
    type Response = TokioIo<UnixStream>;
    type Error = std::io::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = std::io::Result<TokioIo<UnixStream>>> + Send>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        let path = self.0.clone();
        Box::pin(async move { Ok(TokioIo::new(UnixStream::connect(path).await?)) })
    }
}

/// What the agent said, without the protocol around it.
fn sentence(status: Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}
