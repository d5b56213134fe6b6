//! `weft ca init | token | serve`.

use super::{DONE, Failure};
use crate::args::CaCommand;
use crate::ca::placement::Manifests;
use crate::ca::{self, Authority};
use crate::identity::{NodeName, TrustDomain};
use crate::supervise::{Supervisor, Weight};
use anyhow::Context;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Requests that are being answered get this long at the end.
const DRAIN: Duration = Duration::from_secs(5);

pub(super) fn run(command: &CaCommand) -> Result<u8, Failure> {
    match command {
        CaCommand::Init { dir, trust_domain } => {
            let trust_domain: TrustDomain = trust_domain.parse().map_err(Failure::usage)?;
            ca::init(dir, &trust_domain)?;
            println!("made a certificate authority for {trust_domain} in {}", dir.display());
            Ok(DONE)
        }
        CaCommand::Token { dir, node } => {
            let node: NodeName = node.parse().map_err(Failure::usage)?;
            println!("{}", ca::create_token(dir, &node, ca::token::DEFAULT_LIFETIME)?);
            Ok(DONE)
        }
        CaCommand::Serve { dir, listen, manifests, log } => {
            super::agent::log(log)?;
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            runtime.block_on(serve(dir, *listen, manifests))?;
            Ok(DONE)
        }
    }
}

async fn serve(dir: &Path, listen: SocketAddr, manifests: &Path) -> anyhow::Result<()> {
    let authority = Arc::new(Authority::open(dir)?);
    let trust_domain = authority.trust_domain();
    let mut manifests = Manifests::new(manifests.to_owned(), &trust_domain);
    let (sender, placement) = watch::channel(Arc::new(manifests.read()?));
    let listener = TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
    tracing::info!("certificate authority for {trust_domain} on {}", listener.local_addr()?);

    let mut tasks = Supervisor::new();
    let mut served = tasks.drain().guard();
    tasks.spawn("ca", Weight::Critical, async move {
        // The drain waits for this guard, and so for the last answer.
        ca::serve(authority, listener, placement, served.begun()).await?;
        drop(served);
        Ok(())
    });
    tasks.spawn("manifests", Weight::Critical, manifests.follow(sender));
    tasks.run(DRAIN).await
}
