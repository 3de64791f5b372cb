//! Real gateways for the tests: `dnpipes serve` on a free port, reaped when the test ends.

// Each test program uses its part.
#![allow(dead_code)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;

/// A gateway's process.
pub(crate) struct Gateway {
    process: Child,
    url: String,
    source: String,
    args: Vec<String>,
}

impl Gateway {
    /// Starts one on a free port of 127.0.0.1.
    pub(crate) fn start(source: &str, args: &[&str]) -> Self {
        Gateway::start_at(source, args, "127.0.0.1:0", &[])
    }

    /// Starts one at `listen`, by way of `wrapper`, as `ip netns exec NAME`.
    pub(crate) fn start_at(source: &str, args: &[&str], listen: &str, wrapper: &[&str]) -> Self {
        let program = env!("CARGO_BIN_EXE_dnpipes");
        let words: Vec<&str> = wrapper.iter().copied().chain([program]).collect();
        let mut process = Command::new(words[0])
            .args(&words[1..])
            .args(["serve", source, "--listen", listen])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the gateway starts");
        let mut line = String::new();
        let stdout = process.stdout.take().expect("its standard output");
        BufReader::new(stdout)
            .read_line(&mut line)
            .expect("its address");
        let url = line.trim().strip_prefix("listening on ");
        Gateway {
            url: url.unwrap_or_else(|| panic!("{line:?}")).to_owned(),
            process,
            source: source.to_owned(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        }
    }

    /// Its base URL, with a slash at the end.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn port(&self) -> u16 {
        let port = self.url.trim_end_matches('/').rsplit(':').next();
        port.expect("a port").parse().expect("a number")
    }

    pub(crate) fn pid(&self) -> i32 {
        self.process.id() as i32
    }

    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: the process is not reaped yet.
        assert_eq!(unsafe { libc::kill(self.pid(), signal) }, 0);
    }

    /// Kills it and starts another in its place.
    pub(crate) fn crash_and_restart(self) -> Self {
        let (source, args, url) = (self.source.clone(), self.args.clone(), self.url.clone());
        drop(self);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let listen = url.rsplit_once("//").expect("a scheme").1;
        Gateway::start_at(&source, &args, listen.trim_end_matches('/'), &[])
    }

    /// Waits for its end, which must come in time; its exit code.
    pub(crate) fn wait(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().expect("its status") {
                return status.code();
            }
            assert!(start.elapsed() < Duration::from_secs(30), "it does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A port of 127.0.0.1 that nobody listens on.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its address").port()
}

/// An authority, and certificates of it: for a gateway on 127.0.0.1 and for a client.
pub(crate) struct Certificates {
    folder: TempDir,
    authority: CertifiedIssuer<'static, KeyPair>,
}

impl Certificates {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let authority = CertifiedIssuer::self_signed(params, key).expect("an authority");
        let folder = tempfile::tempdir().expect("a folder");
        let made = Certificates { folder, authority };
        fs::write(made.ca(), made.authority.pem()).expect("the authority's file");
        made.issue("gateway");
        made.issue("client");
        made
    }

    /// Makes NAME.pem and NAME.key anew.
    pub(crate) fn issue(&self, name: &str) {
        let names = vec![
            "127.0.0.1".to_owned(),
            "localhost".to_owned(),
            "10.77.0.1".to_owned(),
        ];
        let params = CertificateParams::new(names).expect("names");
        let key = KeyPair::generate().expect("a key");
        let signed = params
            .signed_by(&key, &self.authority)
            .expect("a signature");
        fs::write(self.file(&format!("{name}.pem")), signed.pem()).expect("its file");
        fs::write(self.file(&format!("{name}.key")), key.serialize_pem()).expect("its file");
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.file("ca.pem")
    }

    /// What `dnpipes serve` needs to use them.
    pub(crate) fn flags(&self) -> Vec<String> {
        let path = |name: &str| text(&self.file(name));
        vec![
            "--tls-cert".to_owned(),
            path("gateway.pem"),
            "--tls-key".to_owned(),
            path("gateway.key"),
        ]
    }
}

pub(crate) fn text(path: &Path) -> String {
    path.to_str().expect("a path in UTF-8").to_owned()
}
