from flows.cli.main import start

if __name__ == "__main__":
    start("predict")
