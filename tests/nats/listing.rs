//! Lists, also of what is on servers that are down.

use std::time::{Duration, Instant};

use dnpipes::backend::nats::Nats;
use dnpipes::backend::{Backend, PipeInfo};
use dnpipes::name::PipeName;
use serde_json::json;

use crate::services::Services;
use crate::{LOG, Other, client, keep_log, name, push};

const DEADLINE: Duration = Duration::from_secs(25);

/// A list, once the servers that are left agree on who leads them.
async fn list(client: &Nats) -> Vec<(PipeName, PipeInfo)> {
    let since = Instant::now();
    loop {
        match client.list().await {
            Ok(listed) => return listed,
            Err(error) => assert!(since.elapsed() < DEADLINE, "no list: {error}"),
        }
    }
}

#[tokio::test]
async fn pipes_on_a_server_that_is_down_are_listed_and_hide_no_others() {
    keep_log();
    let services = Services::start(&["nats-cluster"]);
    let servers = services.servers();
    let other = Other::new(&services).await;
    let one = client(&services.url());
    // Each is on a server that the cluster chooses.
    let mut pipes = Vec::new();
    let down = loop {
        let pipe = format!("listed {}", pipes.len());
        push(&one, &pipe, &["x"]).await.expect("stored");
        let what = format!("STREAM.INFO.dnpipes-{}", pipe.replace(' ', "=20"));
        let info = other.api(&what, json!(null)).await;
        let server = info["cluster"]["leader"].as_str().expect("a server");
        pipes.push((pipe, server.to_owned()));
        let away = |(_, server): &&(String, String)| *server != servers[0].name;
        if let Some((_, server)) = pipes.iter().find(away)
            && pipes.iter().any(|(_, other)| other != server)
        {
            break server.clone();
        }
    };
    assert_eq!(one.list().await.expect("a list").len(), pipes.len());
    services.tell("kill", &down);
    let two = client(&services.url());
    for (client, known) in [(&one, 1), (&two, 0)] {
        let listed = list(client).await;
        let expected = pipes.iter().map(|(pipe, server)| match *server == down {
            true => (name(pipe), known),
            false => (name(pipe), 1),
        });
        let listed = listed.iter().map(|(pipe, info)| (pipe.clone(), info.count));
        assert_eq!(listed.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    }
    push(&two, "new", &["x"]).await.expect("stored");
    let is_new = |(pipe, _): &(PipeName, _)| *pipe == name("new");
    assert!(list(&one).await.iter().any(is_new));
    let (away, _) = pipes
        .iter()
        .find(|(_, server)| *server == down)
        .expect("one");
    // Once by each client.
    assert_eq!(LOG.warnings(away).len(), 2, "{:?}", LOG.warnings(away));
}
