//! What operators of servers and accounts limit.

use dnpipes::backend::Backend;
use dnpipes::error::Kind;
use serde_json::{Value, json};

use crate::services::Services;
use crate::{Other, client, contents, name, push, refused};

/// A server whose JetStream has these limits.
fn limited(kind: &str, limits: &str) -> (Services, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let jetstream = format!(
        "jetstream {{ store_dir: {:?}, limits {{ {limits} }} }}",
        folder.path()
    );
    (Services::start(&[kind, "--set", &jetstream]), folder)
}

#[tokio::test]
async fn a_pipe_is_made_where_identities_may_not_be_remembered_for_long() {
    for kind in ["nats", "nats-new"] {
        let (services, _folder) = limited(kind, r#"duplicate_window: "100s""#);
        let client = client(&services.url());
        assert!(client.create(&name("topic")).await.expect("made"));
        assert!(!client.create(&name("topic")).await.expect("it is there"));
        let other = Other::new(&services).await;
        let info = other.api("STREAM.INFO.dnpipes-topic", Value::Null).await;
        assert_eq!(info["config"]["duplicate_window"], 100_000_000_000_u64);
    }
}

#[tokio::test]
async fn an_account_whose_streams_need_max_bytes_says_so() {
    let required = "accounts { A { jetstream { max_bytes_required: true }
        users: [ { user: me, password: s3cret } ] } }";
    for kind in ["nats", "nats-new"] {
        let services = Services::start(&[kind, "--set", required]);
        let at = format!("nats://me:s3cret@127.0.0.1:{}", services.server().port);
        let error = refused(push(&client(&at), "topic", &["x"])).await;
        assert_eq!(error.kind(), Kind::Unsupported, "{kind}: {error}");
        assert!(error.to_string().contains("--max-bytes"), "{kind}: {error}");
        let me = async_nats::ConnectOptions::with_user_and_password("me".into(), "s3cret".into());
        let other = Other(me.connect(&at).await.expect("a connection"));
        let room = json!({ "max_bytes": 1_000_000, "discard": "new" });
        other.stream("dnpipes-topic", room).await;
        push(&client(&at), "topic", &["x"]).await.expect("stored");
    }
}

#[tokio::test]
async fn a_stream_whose_consumers_may_not_be_idle_for_long_is_read() {
    let services = Services::start(&["nats-new"]);
    let (client, other) = (client(&services.url()), Other::new(&services).await);
    let limits = json!({ "consumer_limits": { "inactive_threshold": 10_000_000_000_u64 } });
    other.stream("dnpipes-topic", limits).await;
    push(&client, "topic", &["a", "b"]).await.expect("stored");
    assert_eq!(contents(&client, "topic").await, ["a", "b"]);
}

#[tokio::test]
async fn all_is_read_of_a_server_that_gives_few_messages_at_a_time() {
    for kind in ["nats", "nats-new"] {
        let (services, _folder) = limited(kind, "max_request_batch: 10");
        let client = client(&services.url());
        let long = "x".repeat(100_000);
        let mut messages = vec![""; 999];
        messages[500] = &long;
        push(&client, "topic", &messages).await.expect("stored");
        assert!(contents(&client, "topic").await == messages, "{kind}");
    }
}
