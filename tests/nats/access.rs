//! Who may come in, and as whom.

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use dnpipes::backend::Backend;
use dnpipes::backend::retry::Retry;
use dnpipes::error::Kind;
use nkeys::KeyPair;
use serde_json::{Value, json};

use crate::gateway::Certificates;
use crate::services::Services;
use crate::{batch, client, name, new_id, pull, push, refused};

/// Pushes and pulls by way of `url`, or is refused because of who it is.
async fn try_in(url: &str, welcome: bool) {
    let client = client(url);
    if welcome {
        push(&client, "topic", &["x"]).await.expect(url);
        pull(&client, "topic").await.expect(url);
        return;
    }
    let error = refused(push(&client, "topic", &["x"])).await;
    assert_eq!(error.kind(), Kind::Denied, "{url}: {error}");
    assert!(!error.to_string().contains("wrong@"), "{error}");
}

#[tokio::test]
async fn user_and_password_or_a_token_are_asked_for() {
    for kind in ["nats", "nats-new"] {
        let password = "authorization { user: me, password: s3cret }";
        let services = Services::start(&[kind, "--set", password]);
        let at = format!("127.0.0.1:{}/", services.server().port);
        try_in(&format!("nats://me:s3cret@{at}"), true).await;
        try_in(&format!("nats://me:wrong@{at}"), false).await;
        try_in(&format!("nats://{at}"), false).await;
        let token = "authorization { token: s3cret }";
        let services = Services::start(&[kind, "--set", token]);
        let at = format!("127.0.0.1:{}/", services.server().port);
        try_in(&format!("nats://s3cret@{at}"), true).await;
        try_in(&format!("nats://wrong@{at}"), false).await;
    }
}

#[tokio::test]
async fn a_user_without_the_permission_is_told_at_once() {
    for kind in ["nats", "nats-new"] {
        let users = r#"authorization { users: [
            { user: all, password: s3cret }
            { user: reads, password: s3cret, permissions: { publish: { deny: ["dnpipes-topic", "$JS.API.STREAM.PURGE.>"] } } }
            { user: none, password: s3cret, permissions: { subscribe: { deny: "_INBOX.>" } } }
        ] }"#;
        let services = Services::start(&[kind, "--set", users]);
        let at = format!("127.0.0.1:{}/", services.server().port);
        let all = client(&format!("nats://all:s3cret@{at}"));
        push(&all, "topic", &["a", "b"]).await.expect("stored");
        let reads = client(&format!("nats://reads:s3cret@{at}"));
        assert_eq!(pull(&reads, "topic").await.expect("messages"), ["a", "b"]);
        let pipe = crate::name("topic");
        for error in [
            refused(push(&reads, "topic", &["one"])).await,
            refused(push(&reads, "topic", &["one", "two"])).await,
            refused(reads.reset(&pipe)).await,
            refused(client(&format!("nats://none:s3cret@{at}")).list()).await,
        ] {
            assert_eq!(error.kind(), Kind::Denied, "{kind}: {error}");
        }
        assert_eq!(pull(&all, "topic").await.expect("messages"), ["a", "b"]);
    }
}

#[tokio::test]
async fn a_server_without_jetstream_is_named_as_such() {
    for kind in ["nats", "nats-new"] {
        let accounts = "accounts { plain { users: [ { user: me, password: s3cret } ] } }";
        let services = Services::start(&[kind, "--set", accounts]);
        let url = format!("nats://me:s3cret@127.0.0.1:{}/", services.server().port);
        let error = refused(push(&client(&url), "topic", &["x"])).await;
        assert_eq!(error.kind(), Kind::Unsupported, "{kind}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jetstream_that_is_behind_a_server_without_is_waited_for() {
    let services = Services::start(&["nats-leaf"]);
    let (hub, leaf) = (services.named("hub"), services.named("leaf"));
    let patient = Retry::new(Arc::new(client(&leaf.url)), Some(Duration::from_secs(30)));
    let pipe = name("topic");
    let stored = patient.push(&pipe, new_id(), batch(&["a"])).await;
    stored.expect("stored");
    services.tell("kill", &hub.name);
    let pushing =
        tokio::spawn(async move { patient.push(&name("topic"), new_id(), batch(&["b"])).await });
    services.tell("start", &hub.name);
    pushing.await.expect("an end").expect("stored");
    let stored = pull(&client(&hub.url), "topic").await;
    assert_eq!(stored.expect("messages"), ["a", "b"]);
}

#[tokio::test]
async fn tls_is_checked_on_both_sides() {
    let certificates = Certificates::new();
    let folder = certificates.ca().parent().expect("a folder").to_owned();
    let folder = folder.to_str().expect("text");
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind, "--certs", folder]);
        let port = services.server().port;
        let ca = format!("?ca={}", certificates.ca().display());
        try_in(&format!("tls://127.0.0.1:{port}/{ca}"), true).await;
        // Its authority is none of the system's.
        try_in(&format!("tls://127.0.0.1:{port}/"), false).await;
    }
    let services = Services::start(&["nats-new"]);
    let ca = certificates.ca();
    let port = services.server().port;
    let url = format!("tls://127.0.0.1:{port}/?ca={}", ca.display());
    let error = client(&url).list().await.expect_err("no TLS there");
    assert!(error.to_string().contains("TLS"), "{error}");
}

#[tokio::test]
async fn a_server_that_asks_for_a_certificate_takes_its_authoritys_only() {
    let (certificates, strangers) = (Certificates::new(), Certificates::new());
    let ca = certificates.ca();
    let server = format!(
        "tls {{ cert_file: {:?}, key_file: {:?}, ca_file: {ca:?}, verify: true }}",
        certificates.file("gateway.pem"),
        certificates.file("gateway.key"),
    );
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind, "--set", &server]);
        let at = format!(
            "tls://127.0.0.1:{}/?ca={}",
            services.server().port,
            ca.display()
        );
        let with = |of: &Certificates| {
            let (cert, key) = (of.file("client.pem"), of.file("client.key"));
            format!("{at}&cert={}&key={}", cert.display(), key.display())
        };
        try_in(&with(&certificates), true).await;
        try_in(&with(&strangers), false).await;
        try_in(&at, false).await;
    }
}

#[tokio::test]
async fn a_server_may_expect_the_handshake_of_tls_first() {
    let certificates = Certificates::new();
    let server = format!(
        "tls {{ cert_file: {:?}, key_file: {:?}, handshake_first: true }}",
        certificates.file("gateway.pem"),
        certificates.file("gateway.key"),
    );
    // Older ones cannot.
    let services = Services::start(&["nats-new", "--set", &server]);
    let ca = certificates.ca();
    let url = format!(
        "tls://127.0.0.1:{}/?ca={}",
        services.server().port,
        ca.display()
    );
    let error = client(&url).list().await.expect_err("both wait");
    assert_eq!(error.kind(), Kind::Unreachable);
    assert!(error.to_string().contains("tls_first=yes"), "{error}");
    try_in(&format!("{url}&tls_first=yes"), true).await;
}

/// Takes the right to hear answers from a user, or gives it back.
fn let_hear(services: &Services, hears: bool) {
    let server = services.server();
    let config = server.folder.join("config");
    let text = std::fs::read_to_string(&config).expect("its configuration");
    let (from, to) = match hears {
        true => ("\"nothing\"", "\"_INBOX.>\""),
        false => ("\"_INBOX.>\"", "\"nothing\""),
    };
    std::fs::write(&config, text.replace(from, to)).expect("written");
    let log = || std::fs::read_to_string(server.folder.join("log")).expect("its log");
    let reloads = |log: &str| log.matches("Reloaded: authorization").count();
    let before = reloads(&log());
    // SAFETY: the server is a child of a child, which is not reaped before its end.
    assert_eq!(unsafe { libc::kill(server.pid, libc::SIGHUP) }, 0);
    let since = Instant::now();
    while reloads(&log()) == before {
        assert!(since.elapsed() < Duration::from_secs(10), "{}", log());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[tokio::test]
async fn answers_that_did_not_come_do_not_keep_later_ones_away() {
    const PATIENCE: Duration = Duration::from_secs(4);
    for kind in ["nats", "nats-new"] {
        let users = r#"authorization { users: [
            { user: me, password: s3cret, permissions: { publish: ">", subscribe: ["_INBOX.>"] } }
        ] }"#;
        let services = Services::start(&[kind, "--set", users]);
        let at = format!("nats://me:s3cret@127.0.0.1:{}/", services.server().port);
        let client = client(&at);
        push(&client, "topic", &["x"]).await.expect("stored");
        let_hear(&services, false);
        let_hear(&services, true);
        // Who asks before it is known what has happened is refused, or gives up before the server is held for dead.
        let mut tries = 0;
        loop {
            match tokio::time::timeout(PATIENCE, push(&client, "topic", &["x"])).await {
                Ok(Ok(_)) => break,
                Ok(Err(error)) => assert_eq!(error.kind(), Kind::Denied, "{kind}: {error}"),
                Err(_) => {}
            }
            tries += 1;
            assert!(tries < 2, "{kind}: no answer comes any more");
        }
    }
}

/// What `issuer` says of `subject`, signed.
fn jwt(issuer: &KeyPair, subject: &KeyPair, nats: Value) -> String {
    let header = json!({ "typ": "JWT", "alg": "ed25519-nkey" });
    let claims = json!({
        "jti": "test",
        "iat": 1_700_000_000,
        "iss": issuer.public_key(),
        "sub": subject.public_key(),
        "name": "test",
        "nats": nats,
    });
    let [header, claims] = [header, claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string()));
    let signed = format!("{header}.{claims}");
    let signature = issuer.sign(signed.as_bytes()).expect("a signature");
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

/// A file as `nsc` writes it.
fn creds(jwt: &str, user: &KeyPair) -> String {
    let seed = user.seed().expect("a seed");
    format!(
        "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
}

#[tokio::test]
async fn a_user_of_an_operator_comes_in_by_its_creds_file() {
    let operator = KeyPair::new_operator();
    let (system, account) = (KeyPair::new_account(), KeyPair::new_account());
    let limits = json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true,
        "conn": -1, "leaf": -1, "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
    });
    let of_account = json!({ "type": "account", "version": 2, "limits": limits });
    let of_system = json!({ "type": "account", "version": 2 });
    let of_operator = json!({ "type": "operator", "version": 2 });
    let of_user = json!({ "type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1 });
    let lines = [
        format!("operator: {}", jwt(&operator, &operator, of_operator)),
        format!("system_account: {}", system.public_key()),
        "resolver: MEMORY".to_owned(),
        format!(
            "resolver_preload: {{ {}: {}, {}: {} }}",
            account.public_key(),
            jwt(&operator, &account, of_account),
            system.public_key(),
            jwt(&operator, &system, of_system),
        ),
    ];
    let folder = tempfile::tempdir().expect("a folder");
    let (user, stranger) = (KeyPair::new_user(), KeyPair::new_user());
    for (name, key) in [("user", &user), ("wrong", &stranger)] {
        let text = creds(&jwt(&account, &user, of_user.clone()), key);
        std::fs::write(folder.path().join(name), text).expect("written");
    }
    for kind in ["nats", "nats-new"] {
        let set: Vec<&str> = lines.iter().flat_map(|line| ["--set", line]).collect();
        let services = Services::start(&[&[kind][..], &set].concat());
        let url = |name| {
            let file = folder.path().join(name);
            format!("{}/?creds={}", services.url(), file.display())
        };
        try_in(&url("user"), true).await;
        try_in(&url("wrong"), false).await;
    }
}
