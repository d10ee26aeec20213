FROM scratch
COPY coredns /
USER 65532:65532
ENTRYPOINT ["/coredns"]
