//! TLS: the gateway's certificate, and whose clients' certificates it takes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

use crate::error::{Error, Kind, Result};

/// The files, PEM each.
#[derive(Debug, Clone)]
pub struct Files {
    /// The certificate chain, the gateway's own first.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Authorities whose clients are let in; with it a client needs a certificate.
    pub client_ca: Option<PathBuf>,
}

impl Files {
    /// Reads them.
    ///
    /// # Errors
    /// With the file that is missing, not readable or not what it should be.
    pub fn load(&self) -> Result<Arc<ServerConfig>> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| bad(&self.cert, error))?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(path)? {
                    roots.add(certificate).map_err(|error| bad(path, error))?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                        .build()
                        .map_err(|error| bad(path, error))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let key = PrivateKeyDer::from_pem_slice(&read(&self.key)?)
            .map_err(|error| bad(&self.key, error))?;
        let mut config = builder
            .with_single_cert(certificates(&self.cert)?, key)
            .map_err(|error| bad(&self.cert, error))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let found = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(|error| bad(path, error))?;
    match found.is_empty() {
        true => Err(bad(path, "there is no certificate in it")),
        false => Ok(found),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| Error::io(path.display().to_string(), error))
}

fn bad(path: &Path, why: impl std::fmt::Display) -> Error {
    Error::new(Kind::InvalidInput, format!("{}: {why}", path.display()))
}
