//! `dnpipes serve`: start, readiness, signals, end.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};

use super::{Outcome, raise_file_limit, runtime, source_or_default, tell_ready};
use crate::backend::{self, retry::Retry};
use crate::cli::ServeArgs;
use crate::error::{Error, Kind, Result};
use crate::gateway::Gateway;
use crate::gateway::access::Access;
use crate::gateway::server::Server;
use crate::gateway::tls;

/// Threads of the runtime, at least: one that waits for a slow disk leaves others.
const THREADS: usize = 4;

/// Descriptors that it needs for itself and its store.
const OWN_FILES: u64 = 16;

pub(super) fn serve(args: ServeArgs) -> Result<Outcome> {
    let closed = args.token_file.is_some() || args.tls_client_ca.is_some();
    if !args.listen.ip().is_loopback() && !closed && !args.insecure {
        let why = format!(
            "{} can be reached by others: say who may come in by --token-file or --tls-client-ca, or let \
             everybody in by --insecure",
            args.listen.ip()
        );
        return Err(Error::new(Kind::InvalidInput, why).usage());
    }
    if args.token_file.is_some() && args.tls_cert.is_none() && !args.listen.ip().is_loopback() {
        log::warn!("tokens travel in clear: there is no --tls-cert");
    }
    let access = access(&args)?;
    let tls = tls_files(&args);
    let config = tls.as_ref().map(tls::Files::load).transpose()?;
    let source = source_or_default(args.source.clone())?;
    let connections = connections_within(args.max_connections, raise_file_limit());
    super::logging::never_wait();
    let threads = std::thread::available_parallelism().map_or(THREADS, |n| n.get().max(THREADS));
    let runtime = runtime(threads)?;
    let outcome = runtime.block_on(async {
        let backend = Retry::new(backend::open(&source)?, args.timeout).waiting_for_ever();
        let gateway = Arc::new(Gateway::new(Arc::new(backend), access));
        let server = Server::listen(Arc::clone(&gateway), args.listen, config, connections).await?;
        let failed = |error| Error::io("waiting for signals", error);
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut hangup = signal(SignalKind::hangup()).map_err(failed)?;
        announce(&server.url()?);
        tell_ready();
        log::info!("offering {source}");
        let end = async {
            loop {
                tokio::select! {
                    _ = terminate.recv() => return,
                    _ = interrupt.recv() => return,
                    _ = hangup.recv() => reload(&args, tls.as_ref(), &gateway, &server),
                }
            }
        };
        server.serve(end).await;
        Ok(Outcome::Done)
    });
    // What still waits for a backend must not keep the program from ending.
    runtime.shutdown_background();
    outcome
}

/// How many connections are taken: a reader who waits may need one to a broker as well. Without a descriptor left the store
/// could not be read, nor anybody be told so.
fn connections_within(wanted: u32, files: u64) -> usize {
    let most = (files / 2).saturating_sub(OWN_FILES).max(1);
    if u64::from(wanted) <= most {
        return wanted as usize;
    }
    log::warn!(
        "{most} connections are taken at a time, not {wanted}: {files} files may be open (ulimit -n)"
    );
    most as usize
}

/// Says where it listens; who starts it on port 0 has to know.
fn announce(url: &str) {
    let mut stdout = std::io::stdout().lock();
    if let Err(error) = writeln!(stdout, "listening on {url}").and_then(|()| stdout.flush()) {
        log::debug!("nobody wants to know that it listens on {url}: {error}");
    }
}

fn access(args: &ServeArgs) -> Result<Access> {
    match &args.token_file {
        Some(path) => {
            let access = Access::from_file(path)?;
            warn_of_readers(path);
            Ok(access)
        }
        None if args.insecure => Ok(Access::open()),
        None if args.tls_client_ca.is_some() => Ok(Access::certified()),
        None => Ok(Access::local()),
    }
}

/// Says so where others than those whom the file is for can read it.
fn warn_of_readers(tokens: &Path) {
    let mode = std::fs::metadata(tokens).map_or(0, |file| file.mode());
    if mode & 0o004 != 0 {
        log::warn!(
            "{}: every user of this host can read the tokens (chmod o= helps)",
            tokens.display()
        );
    }
}

fn tls_files(args: &ServeArgs) -> Option<tls::Files> {
    Some(tls::Files {
        cert: args.tls_cert.clone()?,
        key: args.tls_key.clone()?,
        client_ca: args.tls_client_ca.clone(),
    })
}

/// Reads the tokens and the certificates anew. What is not good is left as it was.
fn reload(args: &ServeArgs, tls: Option<&tls::Files>, gateway: &Gateway, server: &Server) {
    match access(args) {
        Ok(access) => gateway.set_access(access),
        Err(error) => log::error!("the tokens stay as they were: {error}"),
    }
    match tls.map(tls::Files::load).transpose() {
        Ok(Some(config)) => server.set_tls(config),
        Ok(None) => {}
        Err(error) => log::error!("the certificates stay as they were: {error}"),
    }
    log::info!("read tokens and certificates anew");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_the_store() {
        for (files, taken) in [(1 << 20, 1024), (2080, 1024), (1024, 496), (64, 16), (8, 1)] {
            assert_eq!(connections_within(1024, files), taken, "{files}");
        }
        assert_eq!(connections_within(5, 64), 5);
    }
}
