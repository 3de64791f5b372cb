//! How mounts hear of resets by others on Redis.

use std::net::SocketAddr;
use std::time::Duration;

use dnpipes::backend::redis::{Redis, RedisUrl};
use dnpipes::backend::{Backend, Start};
use dnpipes::name::PipeName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::redis::start;

/// Two beats of what asks for a sign of life, and as long as an answer may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// A way to the server on which the connection that hears of resets can be muted: it stays, and takes what is sent.
struct Mutable {
    port: u16,
    /// How many such connections there were.
    ears: watch::Receiver<usize>,
    muted: watch::Sender<bool>,
}

impl Mutable {
    async fn new(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let (muted, is_muted) = watch::channel(false);
        let (count, ears) = watch::channel(0);
        let count = std::sync::Arc::new(count);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let far = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], server))).await;
                let (mut from_near, mut to_near) = near.into_split();
                let (mut from_far, mut to_far) = far.expect("the server").into_split();
                let (is_muted, count) = (is_muted.clone(), std::sync::Arc::clone(&count));
                let (ear, is_ear) = watch::channel(false);
                // One that comes later works.
                let was_muted = *is_muted.borrow();
                let is_off = move |is_ear: bool| is_ear && !was_muted && *is_muted.borrow();
                let off = is_off.clone();
                tokio::spawn(async move {
                    let mut piece = vec![0; 1 << 16];
                    while let Ok(length @ 1..) = from_near.read(&mut piece).await {
                        if memchr::memmem::find(&piece[..length], b"SUBSCRIBE").is_some() {
                            ear.send_replace(true);
                        }
                        let is_ear = *ear.borrow();
                        if !off(is_ear) && to_far.write_all(&piece[..length]).await.is_err() {
                            return;
                        }
                    }
                });
                tokio::spawn(async move {
                    let mut piece = vec![0; 1 << 16];
                    while let Ok(length @ 1..) = from_far.read(&mut piece).await {
                        let is_ear = *is_ear.borrow();
                        if !is_off(is_ear) && to_near.write_all(&piece[..length]).await.is_err() {
                            return;
                        }
                        if memchr::memmem::find(&piece[..length], b"subscribe\r\n").is_some() {
                            count.send_modify(|count| *count += 1);
                        }
                    }
                });
            }
        });
        Mutable { port, ears, muted }
    }

    /// Waits until so many connections hear of resets.
    async fn heard_by(&mut self, ears: usize) {
        let there = self.ears.wait_for(|count| *count >= ears);
        let there = tokio::time::timeout(DEADLINE, there).await;
        there.expect("a connection in time").expect("the way");
    }
}

fn client(port: u16) -> Redis {
    let url = RedisUrl::parse(&format!("redis://127.0.0.1:{port}/")).expect("a URL");
    Redis::open(&url).expect("a client")
}

/// The connection that tells of resets asks nothing by itself, and TCP is content with what is between.
#[tokio::test(flavor = "multi_thread")]
async fn a_reset_is_heard_of_though_the_connection_that_tells_is_mute() {
    let (_services, server) = start(&[]);
    let topic = PipeName::new("topic").expect("legal");
    let mut way = Mutable::new(server.port).await;
    let (near, far) = (client(server.port), client(way.port));
    near.create(&topic).await.expect("a pipe");
    let source = far.subscribe(&topic, Start::Oldest).await;
    let floor = source.expect("a source").floor();
    way.heard_by(1).await;
    way.muted.send_replace(true);
    let before = floor.position();
    near.reset(&topic).await.expect("reset");
    way.heard_by(2).await;
    let risen = async {
        while floor.position() <= before {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let risen = tokio::time::timeout(DEADLINE, risen).await;
    risen.expect("the reset is heard of");
}
